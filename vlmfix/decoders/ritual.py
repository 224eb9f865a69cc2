"""RITUAL: the logits of a branch that sees transformed pictures added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmfix.decoders.contrast import assemble, keep, plausible
from vlmfix.errors import UsageError
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.transformed import TRANSFORMS, Transformed


@dataclass(frozen=True)
class Ritual(DecodingMethod):
    """Random image transformations as a universal anti-hallucination lever, a reading of the abstract.

    "RITUAL: Random Image Transformations as a Universal Anti-hallucination Lever in Large Vision Language Models",
    arXiv 2405.17821: s = z + alpha z' on the plausible set of z, z' from the same prompt with every picture transformed
    at random. The list of transformations and their ranges are our choices.

    Args:
        alpha: weight of the transformed branch; 0 drops it and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        transform: "random", or one of hflip, vflip, rotate (half a turn), crop, colour, blur for all pictures.
        transform_seed: of the draws; a picture's draw depends on this and on its place within its row.
    """

    alpha: float = 3.0
    beta: float = 0.1
    transform: str = "random"
    transform_seed: int = 0

    def neutral(self) -> bool:
        """Neither a branch nor a mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if self.transform not in ("random", *TRANSFORMS):
            raise UsageError(f"ritual(transform={self.transform!r}): give random, {', '.join(TRANSFORMS)}")
        return self

    def branches(self) -> tuple[View, ...]:
        """The same prompt with transformed pictures."""
        return (Transformed(self.transform, self.transform_seed),) if self.alpha else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The sum; where the branches agree it sharpens the distribution by 1 + alpha."""
        scores = assemble(logits, step.branches[0], self.alpha) if step.branches else logits
        return keep(scores, plausible(logits, self.beta))
