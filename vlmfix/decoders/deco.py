"""DeCo: the logits of the early layer that believes most in a likely token added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.method import DecodingMethod, LayerSpec, Method, ModelFacts, Step, check_range, resolve_layers


@dataclass(frozen=True)
class DeCo(DecodingMethod):
    """Dynamic Correction Decoding, a reading of the abstract and of public summaries of arXiv 2410.11779.

    "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation": among the candidates of the last layer
    (top-k and top-p), the early layer that gives one of them the highest probability m is the anchor, and s = z +
    alpha m z_anchor on the candidates. No reference vectors exist here.

    Args:
        alpha: weight; 0 is neutral.
        layers: early layers, two fractions of depth or exact indices.
        top_k: most candidates.
        top_p: candidates cover at least this probability.
    """

    needs_picture: ClassVar[bool] = False

    alpha: float = 0.6
    layers: LayerSpec = (0.625, 0.90625)
    top_k: int = 20
    top_p: float = 0.9

    def neutral(self) -> bool:
        """No early logits."""
        return self.alpha == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "top_p", 0, 1, open_low=True)
        check_range(self, "top_k", 1, 10_000)
        self.taps(facts.depth)
        return self

    def taps(self, depth: int) -> tuple[int, ...]:
        """The early layers."""
        return resolve_layers(self.layers, depth)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Corrected logits of the candidates."""
        allowed = candidates(logits, self.top_k, self.top_p)
        early = step.early(True)
        belief = early.softmax(-1).masked_fill(~allowed, 0.0).amax(-1)
        most, anchor = belief.max(0)
        rows = torch.arange(logits.shape[0], device=logits.device)
        corrected = logits + self.alpha * most[:, None] * early[anchor, rows]
        return corrected.masked_fill(~allowed, float("-inf"))


def candidates(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, V] bool: the fewest most likely tokens that cover top_p, at most top_k."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    kept = (p.cumsum(-1) - p < top_p) & (torch.arange(p.shape[-1], device=p.device) < top_k)
    return torch.zeros_like(kept).scatter(1, order, kept)
