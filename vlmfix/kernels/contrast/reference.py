"""Contrast of branch logits, truncation and choice of a token: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


def contrast(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    base: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    entropy_floor: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """Scores base * x - sum_n weight_n * y_n on the plausible tokens, -inf elsewhere.

    Raw logits and log-probabilities serve alike: within a row they differ by a constant, which moves every score by a
    constant as long as base is 1 + sum_n weight_n.

    Args:
        x: [B, V] logits of the visible rows; -inf rules a token out.
        y: [N, B, V] logits of the branches; where a branch says -inf, it contrasts nothing.
        weight: [B, N].
        base: [B] factor on x; 1 + sum_n weight_n by default.
        beta: [B] a token is plausible if its probability is at least beta times the largest; 0 for all tokens.
        gate: [B] the contrast acts only where the largest probability is below the gate; elsewhere the score is x.
        entropy_floor: divides each weight by the entropy of its branch in nats, clamped from below by this.
        normalise: returns log-probabilities.

    Returns:
        [B, V] in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y, weight = x.to(dtype), y.to(dtype), weight.to(dtype)
    if entropy_floor is not None:
        weight = weight / _entropy(y).T.clamp(min=entropy_floor)
    base = 1 + weight.sum(1) if base is None else base.to(dtype)
    ruled_out = x == NEVER
    other = torch.where(y == NEVER, x, y)
    scores = base[:, None] * x - torch.einsum("bn,nbv->bv", weight, torch.where(ruled_out, 0.0, other))
    if gate is not None:
        sure = torch.softmax(x, -1).amax(-1) >= gate.to(dtype)
        scores = torch.where(sure[:, None], x, scores)
    scores = scores.masked_fill(ruled_out, NEVER)
    if beta is not None:
        floor = x.amax(-1, keepdim=True) + beta.to(dtype).log()[:, None]
        scores = scores.masked_fill(x < floor, NEVER)
    return torch.log_softmax(scores, -1) if normalise else scores


def choose(
    scores: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """One token per row: the best (smallest index among equals), or a draw by inverse CDF in vocabulary order.

    Args:
        scores: [B, V] float32.
        temperature: [B] divides the scores.
        top_k: [B] keeps the k largest scores (and their equals); 0 keeps all.
        top_p: [B] then keeps the smallest set of largest scores whose probability reaches p (and their equals).
        u: [B] uniform numbers in [0, 1); None chooses the best.

    Returns:
        [B] int64.
    """
    if u is None:
        return scores.argmax(-1)
    if temperature is not None:
        scores = scores / temperature.to(scores.dtype)[:, None]
    ranked = scores.sort(-1, descending=True).values
    if top_k is not None:
        k = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long()
        floor = ranked.gather(1, k[:, None] - 1)
        scores, ranked = (s.masked_fill(s < floor, NEVER) for s in (scores, ranked))
    if top_p is not None:
        p = torch.softmax(ranked, -1)
        kept = (p.cumsum(-1) - p) < top_p.to(p.dtype)[:, None]
        kept[:, 0] = True
        floor = ranked.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < floor, NEVER)
    mass = torch.exp(scores - scores.amax(-1, keepdim=True))
    below = mass.cumsum(-1) <= u.to(mass.dtype)[:, None] * mass.sum(-1, keepdim=True)
    last = torch.where(mass > 0, torch.arange(mass.shape[1], device=mass.device), 0).amax(-1)
    return torch.minimum(below.sum(-1), last)


def _entropy(y: Tensor) -> Tensor:
    """[N, B] entropy in nats."""
    logs = torch.log_softmax(y, -1)
    return -(logs.exp() * torch.where(logs == NEVER, 0.0, logs)).sum(-1)
