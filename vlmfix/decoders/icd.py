"""ICD: the logits of a branch with a disturbing instruction subtracted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import Refusal, UsageError
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.noise import STEPS, Noised
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
        noise_step: also contrasts pictures noised as in VCD, t of its schedule; None for the instruction alone.
        total: with noise, the sum of both contrasts as in the released code, which sharpens the distribution twice;
            their mean by default.
        noise_seed: seed of the noise.
    """

    alpha: float = 1.0
    beta: float = 0.1
    disturbance: str = "You are a confused object detector."
    place: Literal["first", "system", "last"] = "first"
    disturbance_ids: tuple[int, ...] | None = None
    noise_step: int | None = None
    total: bool = False
    noise_seed: int = 0

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
        if self.noise_step is not None and (not isinstance(self.noise_step, int) or not 0 <= self.noise_step < STEPS):
            raise UsageError(f"icd(noise_step={self.noise_step!r}): give an integer from 0 to {STEPS - 1}, or None")
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
        """The same pictures under the disturbing instruction, and noised pictures where asked for."""
        if not self.alpha:
            return ()
        disturbed = Inserted(self.disturbance_ids or (), self.place)
        return (disturbed,) if self.noise_step is None else (disturbed, Noised(self.noise_step, self.noise_seed))

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Eq. 5 of the paper with VCD's plausible set."""
        scores = logits
        if step.branches:
            scores = torch.stack([contrast(logits, branch, self.alpha) for branch in step.branches]).sum(0)
            scores = scores if self.total else scores / len(step.branches)
        return keep(scores, plausible(logits, self.beta))
