"""VCD: the logits of a branch with noised pictures subtracted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import UsageError
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.noise import STEPS, Noised


@dataclass(frozen=True)
class VCD(DecodingMethod):
    """Visual Contrastive Decoding, arXiv 2311.16922: s = (1 + alpha) z - alpha z' on the plausible set of z.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p of the clean branch; 0 for no mask.
        noise_step: t of the diffusion schedule, 0..999.
        noise_seed: seed of the noise, so that two runs and two methods see the same.
    """

    alpha: float = 1.0
    beta: float = 0.1
    noise_step: int = 500
    noise_seed: int = 0

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if not isinstance(self.noise_step, int) or not 0 <= self.noise_step < STEPS:
            raise UsageError(f"vcd(noise_step={self.noise_step!r}): give an integer from 0 to {STEPS - 1}")
        return self

    def branches(self) -> tuple[View, ...]:
        """The same prompt with noised pictures."""
        return (Noised(self.noise_step, self.noise_seed),) if self.alpha else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Eq. 3 and 5 of the paper."""
        scores = contrast(logits, step.branches[0], self.alpha) if step.branches else logits
        return keep(scores, plausible(logits, self.beta))
