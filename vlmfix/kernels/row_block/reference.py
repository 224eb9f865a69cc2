"""Attention of given rows to given keys, recomputed from queries, keys and the rows' log-sum-exp: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def row_block(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    reduce: str | None = None,
    index: Tensor | None = None,
    q_pos: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities of a block of the attention matrix.

    Args:
        q: [B, H, R, D] the wanted queries.
        k: [B, Hkv, K, D] keys, not repeated.
        lse: [B, H, R] log-sum-exp of each row over all keys it sees; a row of -inf gives zeros.
        scale: factor on q.k.
        reduce: "mean", "max" or "sum" over heads; None keeps them.
        index: [B, n] the wanted keys; all K by default.
        q_pos: [R] or [B, R] index of each query's own key: later keys are invisible. All are visible by default.
        start: [B] first visible key (left padding).
        mask: [B or 1, R, K] bool, True attends.
        bias: [B or 1, 1 or H, K] added to the scores before the softmax that made lse.

    Returns:
        [B, R, n], or [B, H, R, n] with reduce None, in float32 (float64 for float64 inputs).
    """
    batch, _, rows, _ = q.shape
    keys = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    index = torch.arange(keys, device=k.device).expand(batch, keys) if index is None else index
    chosen = k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])).to(dtype)
    z = torch.einsum("bgsrd,bgnd->bgsrn", q.to(dtype).unflatten(1, (k.shape[1], -1)), chosen).flatten(1, 2) * scale
    if bias is not None:
        wanted = index[:, None, :].expand(-1, bias.shape[1], -1)
        z = z + bias.to(dtype).expand(batch, -1, -1).gather(2, wanted)[:, :, None, :]
    lse = lse.to(dtype)[..., None]
    p = torch.where(lse.isinf(), 0.0, torch.exp(z - torch.where(lse.isinf(), 0.0, lse)))
    seen = visible(index, rows, q_pos, start, mask)
    p = p if seen is None else p.masked_fill(~seen[:, None], 0.0)
    if reduce is None:
        return p
    return p.amax(1) if reduce == "max" else p.mean(1) if reduce == "mean" else p.sum(1)


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    reduce: str | None = None,
    q_pos: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives from all given rows.

    Args:
        q: [B, H, Q, D].
        k: [B, Hkv, K, D].
        lse: [B, H, Q].
        scale: factor on q.k.
        reduce: "mean" or "sum" over heads; None keeps them.
        q_pos: [Q] or [B, Q] index of each query's own key; all keys are visible by default.
        start: [B] first visible key.
        mask: [B or 1, Q, K] bool.
        weight: [B, Q] factor on each row; 1 by default.

    Returns:
        [B, K], or [B, H, K] with reduce None, in float32 (float64 for float64 inputs).
    """
    p = row_block(q, k, lse, scale, None, None, q_pos, start, mask)
    if weight is not None:
        p = p * weight.to(p.dtype)[:, None, :, None]
    mass = p.sum(2)
    return mass if reduce is None else mass.mean(1) if reduce == "mean" else mass.sum(1)


def visible(index: Tensor, rows: int, q_pos: Tensor | None, start: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """[B, R, n] keys that the rows see, None if all."""
    batch, n = index.shape
    seen = None
    if q_pos is not None:
        seen = index[:, None, :] <= q_pos.expand(batch, rows)[:, :, None]
    if start is not None:
        after = (index >= start[:, None])[:, None, :].expand(batch, rows, n)
        seen = after if seen is None else seen & after
    if mask is not None:
        allowed = mask.expand(batch, rows, -1).gather(2, index[:, None, :].expand(-1, rows, -1))
        seen = allowed if seen is None else seen & allowed
    return seen
