"""What contrastive decoding methods share: the plausible set and the weighted difference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def plausible(logits: Tensor, beta: float) -> Tensor:
    """[B, V] True where p_v >= beta * max p, on the visible rows' raw logits; everything for beta = 0."""
    if beta == 0:
        return torch.ones_like(logits, dtype=torch.bool)
    return logits >= logits.amax(-1, keepdim=True) + math.log(beta)


def contrast(logits: Tensor, branch: Tensor, weight: float | Tensor) -> Tensor:
    """S = (1 + w) x - w y; tokens the model itself rules out stay ruled out."""
    floor = torch.finfo(logits.dtype).min / 2
    scores = (1 + weight) * logits - weight * branch.clamp(min=floor)
    return scores.masked_fill(logits <= floor, float("-inf"))


def assemble(logits: Tensor, branch: Tensor, weight: float) -> Tensor:
    """S = x + w y; tokens the model itself rules out stay ruled out."""
    floor = torch.finfo(logits.dtype).min / 2
    return (logits + weight * branch.clamp(min=floor)).masked_fill(logits <= floor, float("-inf"))


def keep(scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores with -inf outside the allowed set."""
    return scores.masked_fill(~allowed, float("-inf"))
