"""PAI's text-only contrast, without its amplification."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import WithoutPictures


@dataclass(frozen=True)
class PAIGuidance(DecodingMethod):
    """The logit part of PAI.

    "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv 2407.21771:
    r = l' + gamma (l - l') on the plausible set of l, l' from the text alone. `pai+pai_guidance` is the whole method.

    Args:
        gamma: weight; 1 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
    """

    gamma: float = 1.1
    beta: float = 0.1

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.gamma == 1 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "gamma", 1, 100)
        check_range(self, "beta", 0, 1)
        return self

    def branches(self) -> tuple[View, ...]:
        """The same text without pictures."""
        return (WithoutPictures(),) if self.gamma != 1 else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probabilities, contrasted."""
        own = logits.log_softmax(-1)
        scores = contrast(own, step.branches[0].log_softmax(-1), self.gamma - 1) if step.branches else own
        return keep(scores, plausible(logits, self.beta))
