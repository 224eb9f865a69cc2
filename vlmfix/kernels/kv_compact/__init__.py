"""Keeping some keys and values of a cache: check, choose, call."""

from __future__ import annotations

from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.kv_compact import reference


def kv_compact(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the kept entries of each row; arguments and result as in `reference.kv_compact`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected equal rows, heads and lengths")
    if keep.shape[:-1] not in (k.shape[:1], k.shape[:2]):
        raise ValueError(f"keep {tuple(keep.shape)}: expected [{k.shape[0]}, n] or [{k.shape[0]}, {k.shape[1]}, n]")
    if not use_triton(k, v):
        return reference.kv_compact(k, v, keep)
    from vlmfix.kernels.kv_compact import triton

    out_k, out_v = triton.kv_compact(rows_contiguous(k), rows_contiguous(v), keep)
    return out_k, out_v
