"""Saliency of one query row: keys and values are read once for all candidates, split over the keys.

Tile rows are pairs of a candidate and a query head that shares the key head. One more candidate, whose dP is 1, yields
sum_j A_j k_j, so that dq = scale * (sum_j A_j dP_j k_j - (sum_j A_j dP_j) sum_j A_j k_j) needs no second pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import launches, multiprocessors, must_cast, power_of_two, precision

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _saliency(
    Q, K, V, Lse, DOut, Own, Start, Bias, Saliency, Acc, Total, scale, n_heads, n_kv, n_k, splits, q_b, q_h, k_b, k_h,
    k_n, v_b, v_h, v_n, bias_b, bias_h, C: tl.constexpr, CB: tl.constexpr, SHARED: tl.constexpr, SB: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, N: tl.constexpr, START: tl.constexpr,
    BIAS: tl.constexpr, CAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one split of the keys of one key/value head."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_kv
    kv = bh % n_kv
    row = tl.arange(0, CB * SB)
    c = row // SB
    shared = row % SB
    h = kv * SHARED + shared
    row_ok = (c <= C) & (shared < SHARED)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(Q + b * q_b + h[:, None] * q_h + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    d_out = tl.load(
        DOut + ((b * C + c) * n_heads + h)[:, None] * DV + dv[None, :],
        mask=(row_ok & (c < C))[:, None] & (dv < DV)[None, :],
        other=0.0,
    ).to(tl.float32)
    if CAST:
        q = q.to(tl.float32)
    lse = tl.load(Lse + b * n_heads + h, mask=row_ok, other=float("-inf")).to(tl.float32)
    first = tl.load(Start + b).to(tl.int32) if START else 0
    last = tl.minimum(tl.load(Own + b).to(tl.int32) + 1, n_k)
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), 16) * 16
    begin = first + split * each
    end = tl.minimum(begin + each, last)
    acc = tl.zeros([CB * SB, BD], tl.float32)
    total = tl.zeros([CB * SB], tl.float32)
    candidate = tl.arange(0, CB)
    for at in range(begin, end, N):
        j = at + tl.arange(0, N)
        here = j < end
        line = j[:, None].to(tl.int64)
        k = tl.load(K + b * k_b + kv * k_h + line * k_n + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(
            V + b * v_b + kv * v_h + line * v_n + dv[None, :], mask=here[:, None] & (dv < DV)[None, :], other=0.0
        )
        if CAST:
            k = k.to(tl.float32)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        ok = (row_ok & (lse != float("-inf")))[:, None] & here[None, :]
        if BIAS:
            z += tl.load(Bias + b * bias_b + h[:, None] * bias_h + j[None, :], mask=ok, other=0.0).to(tl.float32)
        a = tl.where(ok, tl.exp2((z - tl.where(lse == float("-inf"), 0.0, lse)[:, None]) * LOG2E), 0.0)
        dp = tl.dot(d_out, tl.trans(v.to(tl.float32)), input_precision="ieee")
        part = a * tl.where((c == C)[:, None], 1.0, dp)
        acc = tl.dot(part, k.to(tl.float32), acc, input_precision="ieee")
        total += tl.sum(part, 1)
        pooled = tl.sum(tl.reshape(tl.abs(part), (CB, SB, N)), 1)
        to = Saliency + (bh * C + candidate[:, None]) * n_k + j[None, :]
        tl.store(to, pooled, mask=(candidate < C)[:, None] & here[None, :])
    line = ((bh * splits + split) * (C + 1) + c) * SHARED + shared
    tl.store(Total + line, total, mask=row_ok)
    tl.store(Acc + line[:, None] * D + d[None, :], acc, mask=row_ok[:, None] & (d < D)[None, :])


@torch.library.custom_op("vlmfix::saliency_row", mutates_args=())
def saliency_row(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_out: Tensor, scale: float, own: Tensor, start: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Saliency [B, C, n], gradient of the query [B, C, H, D] and delta = sum_j A_j dP_j [B, C, H] of each candidate."""
    batch, heads, _, size = q.shape
    n_kv, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    count, shared = d_out.shape[1], heads // n_kv
    block_shared = power_of_two(shared)
    block = power_of_two(count + 1, max(1, 16 // block_shared))
    tall = block * block_shared
    step = 32 if max(size, size_v) * tall <= 4096 else 16
    splits = max(1, min(triton.cdiv(keys, step), 2 * multiprocessors(q.device.index) // (batch * n_kv)))
    saliency = torch.zeros(batch, n_kv, count, keys, device=q.device, dtype=torch.float32)
    acc = torch.empty(batch, n_kv, splits, count + 1, shared, size, device=q.device, dtype=torch.float32)
    total = torch.empty(batch, n_kv, splits, count + 1, shared, device=q.device, dtype=torch.float32)
    launches["saliency_row"] += 1
    _saliency[(splits, batch * n_kv)](
        q, k, v, lse.contiguous(), d_out.contiguous(), own, start, bias, saliency, acc, total, scale, heads, n_kv, keys,
        splits, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        0 if bias is None or bias.shape[1] == 1 else bias.stride(1), C=count, CB=block, SHARED=shared, SB=block_shared,
        D=size, DV=size_v, BD=power_of_two(size, 16), BDV=power_of_two(size_v, 16), N=step, START=start is not None,
        BIAS=bias is not None, CAST=must_cast(q.dtype), PRECISION=precision(q.dtype), num_warps=8 if tall >= 64 else 4,
    )  # fmt: skip
    acc, total = acc.sum(2), total.sum(2)  # [B, Hkv, C + 1, S, ...]
    delta = total[:, :, :count]
    dq = scale * (acc[:, :, :count] - delta[..., None] * acc[:, :, count:])
    order = (0, 2, 1, 3)
    return saliency.sum(1), dq.permute(*order, 4).flatten(2, 3), delta.permute(order).flatten(2, 3)


@saliency_row.register_fake
def _(q, k, v, lse, d_out, scale, own, start, bias):
    batch, count, heads = d_out.shape[:3]
    saliency = q.new_empty(batch, count, k.shape[2], dtype=torch.float32)
    dq = q.new_empty(batch, count, heads, q.shape[3], dtype=torch.float32)
    return saliency, dq, q.new_empty(batch, count, heads, dtype=torch.float32)


def own_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
    own: Tensor,
    bias: Tensor | None,
    delta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the row's own key and value, [B, C, Hkv, D] and [B, C, Hkv, Dv]."""
    batch, heads = q.shape[:2]
    n_kv = k.shape[1]
    query = q[:, :, 0].float().unflatten(1, (n_kv, -1))  # [B, Hkv, S, D]
    at = own[:, None, None, None]
    key = k.gather(2, at.expand(-1, n_kv, 1, k.shape[3])).float()
    value = v.gather(2, at.expand(-1, n_kv, 1, v.shape[3])).float()
    z = (query * key).sum(-1).flatten(1) * scale
    if bias is not None:
        z = z + bias.float().expand(batch, heads, -1).gather(2, at[..., 0].expand(-1, heads, 1))[..., 0]
    lse = lse.float()
    a = torch.where(lse.isinf(), 0.0, torch.exp(z - torch.where(lse.isinf(), 0.0, lse)))[:, None]  # [B, 1, H]
    d_out = d_out.float()
    dp = (d_out.unflatten(2, (n_kv, -1)) * value[:, None]).sum(-1).flatten(2)
    ds = a * (dp - delta)
    dk = (ds.unflatten(2, (n_kv, -1))[..., None] * scale * query[:, None]).sum(3)
    dv = (a[..., None] * d_out).unflatten(2, (n_kv, -1)).sum(3)
    return dk, dv
