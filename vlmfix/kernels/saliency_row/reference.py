"""Saliency of one query row and the gradients that leave its attention: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SaliencyRow(NamedTuple):
    """What one attention layer contributes for C candidates.

    Args:
        saliency: [B, C, n] sum over query heads of |A * dP|.
        dq: [B, C, H, D] gradient of the query.
        dk_self: [B, C, Hkv, D] gradient of the query's own key.
        dv_self: [B, C, Hkv, Dv] gradient of the query's own value.
    """

    saliency: Tensor
    dq: Tensor
    dk_self: Tensor
    dv_self: Tensor


def saliency_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    own: Tensor,
    start: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    only_gradients: bool = False,
) -> SaliencyRow:
    """Attention times gradient of one query row, for C candidates at once, and the exact backward through that row.

    With A_j = exp(scale * q.k_j + bias_j - lse) and dP_j = <d_out, v_j>: saliency_j = sum over heads |A_j dP_j|,
    dS_j = A_j (dP_j - sum_i A_i dP_i), dq = scale * sum_j dS_j k_j, and at the row's own key dk = scale * dS q,
    dv = A d_out. The keys of earlier positions do not depend on this row, so nothing else of the backward exists.
    Source: "Hallucination Begins Where Saliency Drops", arXiv 2601.20279, equation 4.

    Args:
        q: [B, H, 1, D] the query, as it entered the attention.
        k: [B, Hkv, K, D].
        v: [B, Hkv, K, Dv].
        lse: [B, H] log-sum-exp of the row.
        d_out: [B, C, H, Dv] gradient of each candidate's loss by the head outputs.
        scale: factor on q.k.
        own: [B] index of the query's own key; later keys are invisible.
        start: [B] first visible key (left padding).
        bias: [B or 1, 1 or H, K] added to the scores before the softmax that made lse.
        dtype: of the gradients; the saliency's without.
        only_gradients: leaves the saliency out, [B, C, 0].
    """
    batch, heads = q.shape[:2]
    n_kv, keys = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, d_out = (x.to(wide) for x in (q, k, v, d_out))
    z = torch.einsum("bgsd,bgnd->bgsn", q[:, :, 0].unflatten(1, (n_kv, -1)), k).flatten(1, 2) * scale
    z = z if bias is None else z + bias.to(wide)
    index = torch.arange(keys, device=q.device)
    seen = index <= own[:, None]
    seen = seen if start is None else seen & (index >= start[:, None])
    lse = lse.to(wide)[..., None]
    a = torch.where(seen[:, None, :] & ~lse.isinf(), torch.exp(z - torch.where(lse.isinf(), 0.0, lse)), 0.0)
    dp = torch.einsum("bcgsd,bgnd->bcgsn", d_out.unflatten(2, (n_kv, -1)), v).flatten(2, 3)
    part = a[:, None] * dp
    ds = part - a[:, None] * part.sum(-1, keepdim=True)
    dq = torch.einsum("bcgsn,bgnd->bcgsd", ds.unflatten(2, (n_kv, -1)), k).flatten(2, 3) * scale
    at_own = own[:, None, None, None].expand(batch, d_out.shape[1], heads, 1)
    ds_own = ds.gather(3, at_own)
    a_own = a.gather(2, at_own[:, 0])[:, None]
    dk = (ds_own * scale * q[:, None, :, 0]).unflatten(2, (n_kv, -1)).sum(3)
    dv = (a_own * d_out).unflatten(2, (n_kv, -1)).sum(3)
    saliency = part.abs().sum(2)[..., : 0 if only_gradients else None]
    return SaliencyRow(saliency, *(x.to(dtype or wide) for x in (dq, dk, dv)))
