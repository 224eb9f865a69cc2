"""Blocks and column sums of the attention matrix: check, choose, call."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.row_block import reference


def row_block(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    reduce: Literal["mean", "max", "sum"] | None = None,
    *,
    index: Tensor | None = None,
    q_pos: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities of given rows over given keys; arguments and result as in `reference.row_block`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown reduction.
    """
    _check(q, k, lse, reduce, (None, "mean", "max", "sum"))
    if not use_triton(q, k):
        return reference.row_block(q, k, lse, scale, reduce, index, q_pos, start, mask, bias)
    from vlmfix.kernels.row_block import triton

    q, k = rows_contiguous(q), rows_contiguous(k)
    index = None if index is None else index.contiguous()
    mask = None if mask is None else rows_contiguous(mask)
    bias = None if bias is None else rows_contiguous(bias)
    block: Tensor = triton.row_block(q, k, lse, scale, reduce or "", index, q_pos, start, mask, bias)
    return block


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    reduce: Literal["mean", "sum"] | None = None,
    *,
    q_pos: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Attention each key receives from all given rows; arguments and result as in `reference.column_mass`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown reduction.
    """
    _check(q, k, lse, reduce, (None, "mean", "sum"))
    if not use_triton(q, k):
        return reference.column_mass(q, k, lse, scale, reduce, q_pos, start, mask, weight)
    from vlmfix.kernels.row_block import triton

    mask = None if mask is None else rows_contiguous(mask)
    weight = None if weight is None else weight.contiguous()
    mass: Tensor = triton.column_mass(rows_contiguous(q), rows_contiguous(k), lse, scale, q_pos, start, mask, weight)
    return mass if reduce is None else mass.mean(1) if reduce == "mean" else mass.sum(1)


def _check(q: Tensor, k: Tensor, lse: Tensor, reduce: str | None, known: tuple[str | None, ...]) -> None:
    if reduce not in known:
        raise ValueError(f"reduce={reduce!r}: expected one of {known}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: expected equal rows and head sizes, H divisible by Hkv"
        )
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse {tuple(lse.shape)}: expected {tuple(q.shape[:3])}")
