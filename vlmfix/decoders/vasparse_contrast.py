"""VASparse's contrast: what the last token's embedding alone says subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import UsageError
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range


@dataclass(frozen=True)
class VASparseContrast(DecodingMethod):
    """The logit part of VASparse, without its sparse attention.

    "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification", arXiv
    2501.06553, equation 6: s = (1 + alpha) z - alpha z' on the plausible set of z, z' the output head on input
    embeddings, without a pass through the decoder. The paper leaves open which embedding predicts the next token; as in
    the released code it is the last token's, so that masking visual tokens has no part in it. `variant="reference"` is
    the released arithmetic, log_softmax(l - l' - alpha z') with log-probabilities l and l'.

    Args:
        alpha: weight of the contrast; 0 keeps the mask alone (with the reference's arithmetic also its - l').
        beta: plausible set p >= beta * max p; 0 for no mask.
        variant: "paper" or "reference".
    """

    alpha: float = 0.1
    beta: float = 0.1
    variant: Literal["paper", "reference"] = "paper"

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0 and self.variant == "paper"

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if self.variant not in ("paper", "reference"):
            raise UsageError(f"vasparse_contrast(variant={self.variant!r}): give 'paper' or 'reference'")
        return self

    def taps(self, depth: int) -> tuple[int, ...]:
        """The embedding, which enters the first layer."""
        return (0,)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The masked contrast."""
        allowed, embedded = plausible(logits, self.beta), step.early(False)[0]
        if self.variant == "paper":
            return keep(contrast(logits, embedded, self.alpha), allowed)
        scores = logits.log_softmax(-1) - embedded.log_softmax(-1) - self.alpha * embedded
        return keep(scores, allowed).log_softmax(-1)
