"""Saliency of one query row: check, choose, call."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.saliency_row import reference
from vlmfix.kernels.saliency_row.reference import SaliencyRow

__all__ = ["SaliencyRow", "saliency_row"]


def saliency_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    own: Tensor,
    *,
    start: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    only_gradients: bool = False,
) -> SaliencyRow:
    """Attention times gradient of one query row for C candidates; arguments and result as in `reference.saliency_row`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, heads, rows, _ = q.shape
    if rows != 1:
        raise ValueError(f"q {tuple(q.shape)}: expected one query row")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or heads % k.shape[1]:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)}: expected [{batch}, a divisor of {heads}, K, D]")
    if lse.shape != (batch, heads):
        raise ValueError(f"lse {tuple(lse.shape)}: expected {(batch, heads)}")
    if d_out.shape[0] != batch or d_out.shape[2:] != (heads, v.shape[3]):
        raise ValueError(f"d_out {tuple(d_out.shape)}: expected [{batch}, C, {heads}, {v.shape[3]}]")
    if not use_triton(q, k, v):
        return reference.saliency_row(q, k, v, lse, d_out, scale, own, start, bias, dtype, only_gradients)
    from vlmfix.kernels.saliency_row import triton

    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    bias = None if bias is None else rows_contiguous(bias)
    return SaliencyRow(*triton.saliency_row(q, k, v, lse, d_out, scale, own, start, bias, dtype, only_gradients))
