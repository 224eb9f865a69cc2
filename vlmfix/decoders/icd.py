"""ICD: the logits of a branch with a disturbing instruction subtracted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import Refusal, UsageError
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import Inserted

PLACES = ("first", "system", "last")


@dataclass(frozen=True)
class ICD(DecodingMethod):
    """Instruction Contrastive Decoding.

    "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding", arXiv 2403.18715:
    s = (1 + alpha) z - alpha z', z' from the same pictures under a disturbing instruction of any length.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        disturbance: the disturbing text.
        place: "first" puts it before the prompt (works with every chat template; our default), "system" replaces the
            text before the first picture as the reference does with its system message, "last" puts it behind the
            last picture.
        disturbance_ids: its token ids, filled in from the processor's tokenizer.
    """

    alpha: float = 1.0
    beta: float = 0.1
    disturbance: str = "You are a confused object detector."
    place: Literal["first", "system", "last"] = "first"
    disturbance_ids: tuple[int, ...] | None = None

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges and tokenises the disturbance.

        Raises:
            Refusal: there is no tokenizer and no ids were given.
        """
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if self.place not in PLACES:
            raise UsageError(f"icd(place={self.place!r}): give one of {', '.join(PLACES)}")
        if self.disturbance_ids is not None or self.alpha == 0:
            return self
        if facts.tokenize is None:
            raise Refusal(
                "icd needs the processor's tokenizer for its disturbance; give the processor, or disturbance_ids"
            )
        ids = tuple(facts.tokenize(self.disturbance))
        if not ids:
            raise UsageError("icd(disturbance=''): give a text")
        return replace(self, disturbance_ids=ids)

    def branches(self) -> tuple[View, ...]:
        """The same pictures under the disturbing instruction."""
        return (Inserted(self.disturbance_ids or (), self.place),) if self.alpha else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Eq. 5 of the paper with VCD's plausible set."""
        scores = contrast(logits, step.branches[0], self.alpha) if step.branches else logits
        return keep(scores, plausible(logits, self.beta))
