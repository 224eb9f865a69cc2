"""Saliency of one query row: keys and values are read once for all candidates, split over the keys.

Tile rows are pairs of a candidate and a query head that shares the key head. One more candidate, whose dP is 1, yields
sum_j A_j k_j, so that dq = scale * (sum_j A_j dP_j k_j - (sum_j A_j dP_j) sum_j A_j k_j) needs no second pass. Products
of float32 numbers with half-precision keys and values run on the tensor cores, the former as sums of three numbers that
tf32 holds exactly. A second kernel adds up the splits and finishes all gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches, multiprocessors, must_cast, operation, power_of_two, precision

LOG2E = tl.constexpr(1.4426950408889634)

PARTS = True
"""Whether float32 numbers go through the tensor cores in three parts, where keys and values are of half precision."""


@triton.jit
def coarse(x):
    """The part of float32 numbers that tf32 holds exactly."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(x, y, acc, SPLIT: tl.constexpr):
    """Sum acc + x @ y in float32. SPLIT: the numbers of y fit tf32, and x goes in as three parts that do."""
    if SPLIT:
        first = coarse(x)
        second = coarse(x - first)
        acc = tl.dot(x - first - second, y, acc, input_precision="tf32")
        acc = tl.dot(second, y, acc, input_precision="tf32")
        return tl.dot(first, y, acc, input_precision="tf32")
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _saliency(
    Q, K, V, Lse, DOut, Own, Start, Bias, Saliency, Acc, Total, scale, n_heads, n_kv, n_k, splits, q_b, q_h, k_b, k_h,
    k_n, v_b, v_h, v_n, bias_b, bias_h, C: tl.constexpr, CB: tl.constexpr, SHARED: tl.constexpr, SB: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, N: tl.constexpr, START: tl.constexpr,
    BIAS: tl.constexpr, CAST: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
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
        dp = product(d_out, tl.trans(v.to(tl.float32)), tl.zeros([CB * SB, N], tl.float32), SPLIT)
        part = a * tl.where((c == C)[:, None], 1.0, dp)
        acc = product(part, k.to(tl.float32), acc, SPLIT)
        total += tl.sum(part, 1)
        pooled = tl.sum(tl.reshape(tl.abs(part), (CB, SB, N)), 1)
        to = Saliency + (bh * C + candidate[:, None]) * n_k + j[None, :]
        tl.store(to, pooled, mask=(candidate < C)[:, None] & here[None, :])
    line = ((bh * splits + split) * (C + 1) + c) * SHARED + shared
    tl.store(Total + line, total, mask=row_ok)
    tl.store(Acc + line[:, None] * D + d[None, :], acc, mask=row_ok[:, None] & (d < D)[None, :])


@triton.jit
def _finish(
    Q, K, V, Lse, DOut, Own, Start, Bias, Part, Acc, Total, Saliency, Dq, Dk, Dv, scale, n_heads, n_kv, n_k, splits,
    grads, q_b, q_h, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, C: tl.constexpr, SHARED: tl.constexpr,
    SB: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HB: tl.constexpr, N: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of one candidate and key head, or N columns of one candidate's saliency."""
    if tl.program_id(0) < grads:
        line = tl.program_id(0).to(tl.int64)
        c = line % C
        kv = line // C % n_kv
        b = line // (C * n_kv)
        s = tl.arange(0, SB)
        s_ok = s < SHARED
        h = kv * SHARED + s
        d = tl.arange(0, BD)
        dv = tl.arange(0, BDV)
        d_ok = s_ok[:, None] & (d < D)[None, :]
        acc = tl.zeros([SB, BD], tl.float32)
        plain = tl.zeros([SB, BD], tl.float32)
        delta = tl.zeros([SB], tl.float32)
        for at in range(0, splits, CHUNK):
            split = at + tl.arange(0, CHUNK)
            row = (((b * n_kv + kv) * splits + split) * (C + 1))[:, None] * SHARED + s[None, :]
            ok = (split < splits)[:, None] & s_ok[None, :]
            delta += tl.sum(tl.load(Total + row + c * SHARED, mask=ok, other=0.0), 0)
            inside = ok[:, :, None] & (d < D)[None, None, :]
            to = Acc + row[:, :, None] * D + d[None, None, :]
            acc += tl.sum(tl.load(to + c * SHARED * D, mask=inside, other=0.0), 0)
            plain += tl.sum(tl.load(to + C * SHARED * D, mask=inside, other=0.0), 0)
        out = (b * C + c) * n_heads + h
        tl.store(Dq + out[:, None] * D + d[None, :], scale * (acc - delta[:, None] * plain), mask=d_ok)

        own = tl.minimum(tl.load(Own + b), n_k - 1)
        q = tl.load(Q + b * q_b + h[:, None] * q_h + d[None, :], mask=d_ok, other=0.0).to(tl.float32)
        k = tl.load(K + b * k_b + kv * k_h + own * k_n + d, mask=d < D, other=0.0).to(tl.float32)
        v = tl.load(V + b * v_b + kv * v_h + own * v_n + dv, mask=dv < DV, other=0.0).to(tl.float32)
        v_ok = s_ok[:, None] & (dv < DV)[None, :]
        d_out = tl.load(DOut + out[:, None] * DV + dv[None, :], mask=v_ok, other=0.0).to(tl.float32)
        lse = tl.load(Lse + b * n_heads + h, mask=s_ok, other=float("-inf")).to(tl.float32)
        z = tl.sum(q * k[None, :], 1) * scale
        if BIAS:
            z += tl.load(Bias + b * bias_b + h * bias_h + own, mask=s_ok, other=0.0).to(tl.float32)
        a = tl.where(lse == float("-inf"), 0.0, tl.exp2((z - tl.where(lse == float("-inf"), 0.0, lse)) * LOG2E))
        ds = a * (tl.sum(d_out * v[None, :], 1) - delta) * scale
        to = (b * C + c) * n_kv + kv
        tl.store(Dk + to * D + d, tl.sum(ds[:, None] * q, 0), mask=d < D)
        tl.store(Dv + to * DV + dv, tl.sum(a[:, None] * d_out, 0), mask=dv < DV)
    else:
        blocks = tl.cdiv(n_k, N)
        line = (tl.program_id(0) - grads).to(tl.int64)
        j = line % blocks * N + tl.arange(0, N)
        c = line // blocks % C
        b = line // (blocks * C)
        seen = (j < n_k) & (j <= tl.load(Own + b))
        if START:
            seen = seen & (j >= tl.load(Start + b))
        saliency = tl.zeros([N], tl.float32)
        for at in range(0, n_kv, HB):
            kv = at + tl.arange(0, HB)
            row = (b * n_kv + kv) * C + c
            part = tl.load(Part + row[:, None] * n_k + j[None, :], mask=(kv < n_kv)[:, None] & seen[None, :], other=0.0)
            saliency += tl.sum(part, 0)
        tl.store(Saliency + (b * C + c) * n_k + j, saliency, mask=j < n_k)


@operation("saliency_row")
def saliency_row(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_out: Tensor, scale: float, own: Tensor, start: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The four results of `reference.saliency_row`."""
    batch, heads, _, size = q.shape
    n_kv, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    count, shared = d_out.shape[1], heads // n_kv
    block_shared = power_of_two(shared)
    block = power_of_two(count + 1, max(1, 16 // block_shared))
    tall = block * block_shared
    step = 32 if max(size, size_v) * tall <= 8192 else 16
    splits = max(1, min(ceil_div(keys, step), 32, 2 * multiprocessors(q.device.index) // (batch * n_kv)))
    part = torch.empty(batch, n_kv, count, keys, device=q.device, dtype=torch.float32)
    acc = torch.empty(batch, n_kv, splits, count + 1, shared, size, device=q.device, dtype=torch.float32)
    total = torch.empty(batch, n_kv, splits, count + 1, shared, device=q.device, dtype=torch.float32)
    results = _results(q, k, v, d_out)
    lse, d_out = lse.contiguous(), d_out.contiguous()
    strides = (
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
    )  # fmt: skip
    constants = {
        "C": count,
        "SHARED": shared,
        "SB": block_shared,
        "D": size,
        "DV": size_v,
        "BD": power_of_two(size, 16),
        "BDV": power_of_two(size_v, 16),
        "START": start is not None,
        "BIAS": bias is not None,
    }
    launches["saliency_row"] += 1
    _saliency[(splits, batch * n_kv)](
        q, k, v, lse, d_out, own, start, bias, part, acc, total, scale, heads, n_kv, keys, splits, *strides,
        CB=block, N=step, CAST=must_cast(q.dtype), PRECISION=precision(q.dtype), SPLIT=PARTS and q.element_size() == 2,
        num_warps=8 if tall >= 64 else 4, **constants,
    )  # fmt: skip
    grads = batch * n_kv * count
    _finish[(grads + batch * count * ceil_div(keys, 128),)](
        q, k, v, lse, d_out, own, start, bias, part, acc, total, *results, scale, heads, n_kv, keys, splits, grads,
        *strides, CHUNK=min(power_of_two(splits), max(1, 4096 // (block_shared * constants["BD"]))),
        HB=min(power_of_two(n_kv), 32), N=128, num_warps=4, **constants,
    )  # fmt: skip
    return results


@saliency_row.register_fake
def _(q, k, v, lse, d_out, scale, own, start, bias):
    return _results(q, k, v, d_out)


def _results(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, heads, size_v = d_out.shape
    shapes = (k.shape[2],), (heads, q.shape[3]), (k.shape[1], q.shape[3]), (k.shape[1], size_v)
    one, two, three, four = (torch.empty(batch, count, *x, device=q.device, dtype=torch.float32) for x in shapes)
    return one, two, three, four
