"""M3ID: the log-probability ratio to a branch without pictures, weighted more with every token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import WithoutPictures


@dataclass(frozen=True)
class M3ID(DecodingMethod):
    """Multi-Modal Mutual Information Decoding.

    "Multi-Modal Hallucination Control by Visual Information Grounding", arXiv 2403.14003: s = l + w_t (l - l') with
    w_t = exp(lambda t) - 1, t counting generated tokens from 1. With a plausibility mask (the re-implementation in
    AvisC's repository, which the vectors come from), or with the published confidence gate: contrast only where max
    p < gate.

    Args:
        forget_rate: lambda; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for none. Not used with a gate.
        gate: confidence above which a row stays plain; absent for the mask form.
        max_weight: cap on w_t, which grows without bound.
    """

    forget_rate: float = 0.02
    beta: float = 0.1
    gate: float | None = None
    max_weight: float = 50.0

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.forget_rate == 0 and (self.beta == 0 or self.gate is not None)

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "forget_rate", 0, 10)
        check_range(self, "beta", 0, 1)
        check_range(self, "max_weight", 0, 1e6)
        if self.gate is not None:
            check_range(self, "gate", 0, 1)
        return self

    def branches(self) -> tuple[View, ...]:
        """The same text without pictures."""
        return (WithoutPictures(),) if self.forget_rate else ()

    def weight(self, step: int | Tensor) -> float | Tensor:
        """w_t = (1 - gamma_t) / gamma_t with gamma_t = exp(-lambda t), capped."""
        if isinstance(step, Tensor):
            return torch.expm1((self.forget_rate * step.double()).clamp(max=700.0)).clamp(max=self.max_weight)
        return min(math.expm1(min(self.forget_rate * step, 700.0)), self.max_weight)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probabilities, contrasted."""
        own = logits.log_softmax(-1)
        scores = contrast(own, step.branches[0].log_softmax(-1), self.weight(step.number)) if step.branches else own
        if self.gate is not None:
            unsure = own.amax(-1, keepdim=True).exp() < self.gate
            return torch.where(unsure, scores, own)
        return keep(scores, plausible(logits, self.beta))
