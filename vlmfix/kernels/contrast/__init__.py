"""Contrast of branch logits, truncation and choice of a token: check, choose, call."""

from __future__ import annotations

from torch import Tensor

from vlmfix.kernels.contrast import reference
from vlmfix.kernels.dispatch import rows_contiguous, use_triton


def contrast(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    base: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    entropy_floor: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """Scores (1 + w) x - w y on the plausible tokens; arguments and result as in `reference.contrast`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, y, weight)
    if not use_triton(x, y):
        return reference.contrast(x, y, weight, base, beta, gate, entropy_floor, normalise)
    from vlmfix.kernels.contrast import triton

    x, y = rows_contiguous(x), rows_contiguous(y)
    scores: Tensor
    scores, peak, mass = triton.contrast(x, y, weight, base, beta, gate, entropy_floor or 0.0, None)
    return scores - (peak + mass.log()).logsumexp(1, keepdim=True) if normalise else scores


def choose(
    scores: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """One token per row, the best or a seeded draw; arguments and result as in `reference.choose`."""
    if not use_triton(scores):
        return reference.choose(scores, temperature, top_k, top_p, u)
    from vlmfix.kernels.contrast import triton_choose

    tokens: Tensor = triton_choose.choose(rows_contiguous(scores), None, None, temperature, top_k, top_p, u)
    return tokens


def contrast_and_choose(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    base: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    entropy_floor: float | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    u: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`contrast` and `choose` in one go: tokens [B] and scores [B, V].

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, y, weight)
    if not use_triton(x, y):
        scores = reference.contrast(x, y, weight, base, beta, gate, entropy_floor)
        return reference.choose(scores, temperature, top_k, top_p, u), scores
    from vlmfix.kernels.contrast import triton, triton_choose

    x, y = rows_contiguous(x), rows_contiguous(y)
    scores, peak, mass = triton.contrast(x, y, weight, base, beta, gate, entropy_floor or 0.0, temperature)
    return triton_choose.choose(scores, peak, mass, temperature, top_k, top_p, u), scores


def _check(x: Tensor, y: Tensor, weight: Tensor) -> None:
    if y.ndim != 3 or y.shape[1:] != x.shape:
        raise ValueError(f"y {tuple(y.shape)}: expected [branches, {x.shape[0]}, {x.shape[1]}]")
    if weight.shape != (x.shape[0], y.shape[0]):
        raise ValueError(f"weight {tuple(weight.shape)}: expected {(x.shape[0], y.shape[0])}")
