"""Saliency of one query row, split over heads and keys; all candidates of a head share one reading of keys and values.

One more candidate, whose dP is 1, yields sum_j A_j k_j, so that
dq = scale * (sum_j A_j dP_j k_j - (sum_j A_j dP_j) sum_j A_j k_j) needs no second pass. All sums are float32 sums of
ordinary multiply-adds: tensor cores truncate what they add up, which the error budget does not allow here. Keys and
values are loaded as [1, N, D], so that all products have the layout of these loads (a warp per key, each thread with
neighbouring elements): the compiler's own choice for [C, N, D] sums across four warps. A second kernel adds up heads
and splits and finishes all gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, ceil_div, launches, multiprocessors, operation, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def probability(z, lse):
    """exp(z - lse) of z - lse <= 88 to about one rounding.

    Rounding the difference alone costs up to |z - lse| roundings of the result, and the same z summed in another order
    may land on the next float32; so what that rounding took away is kept (Knuth's two-sum). Then 2^n exp(f) with the
    polynomial of Cephes' expf for f in [-log(2) / 2, log(2) / 2]: the hardware's exp2 is off by several roundings.
    """
    x = z - lse
    y = x - z
    lost = (z - (x - y)) - (lse + y)
    n = tl.floor(tl.maximum(x, -87.0) * LOG2E + 0.5)
    f = tl.maximum(x, -87.0) - n * 0.693359375
    f = f + (n * 2.12194440e-4 + lost)
    y = 1.9875691500e-4 * f + 1.3981999507e-3
    y = y * f + 8.3334519073e-3
    y = y * f + 4.1665795894e-2
    y = y * f + 1.6666665459e-1
    y = y * f + 5.0000001201e-1
    y = y * f * f + f + 1
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x >= -87.0, y * power, 0.0)


@triton.jit
def _saliency(
    Q, K, V, Lse, DOut, Own, Start, Bias, Part, Acc, Total, scale, n_heads, n_kv, n_k, splits, q_b, q_h, k_b, k_h,
    k_n, v_b, v_h, v_n, bias_b, bias_h, C: tl.constexpr, CB: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, N: tl.constexpr, START: tl.constexpr, BIAS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One program: one split of the keys of one query head."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_heads
    h = bh % n_heads
    kv = h // (n_heads // n_kv)
    c = tl.arange(0, CB)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(Q + b * q_b + h * q_h + d, mask=d < D, other=0.0).to(tl.float32)
    d_out = tl.load(
        DOut + ((b * C + c) * n_heads + h)[:, None] * DV + dv[None, :],
        mask=(c < C)[:, None] & (dv < DV)[None, :],
        other=0.0,
    ).to(tl.float32)
    lse = tl.load(Lse + bh).to(tl.float32)
    safe = tl.where(lse == float("-inf"), 0.0, lse)
    sees = tl.where(lse == float("-inf"), 0.0, 1.0)
    first = tl.load(Start + b).to(tl.int32) if START else 0
    last = tl.minimum(tl.load(Own + b).to(tl.int32) + 1, n_k)
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), N) * N
    begin = first + split * each
    end = tl.minimum(begin + each, last)
    acc = tl.zeros([CB, N, BD], tl.float32)
    total = tl.zeros([CB, N], tl.float32)
    at_k = K + b * k_b + kv * k_h + d[None, None, :]
    at_v = V + b * v_b + kv * v_h + dv[None, None, :]
    j = begin + tl.arange(0, N)
    next_k = tl.load(
        at_k + j[None, :, None].to(tl.int64) * k_n, mask=(j < end)[None, :, None] & (d < D)[None, None, :], other=0.0
    )
    next_v = tl.load(
        at_v + j[None, :, None].to(tl.int64) * v_n, mask=(j < end)[None, :, None] & (dv < DV)[None, None, :], other=0.0
    )
    for at in range(begin, end, N):
        j = at + tl.arange(0, N)
        here = j < end
        k = next_k.to(tl.float32)
        v = next_v.to(tl.float32)
        more = (j + N < end)[None, :, None]
        line = (j + N)[None, :, None].to(tl.int64)
        next_k = tl.load(at_k + line * k_n, mask=more & (d < D)[None, None, :], other=0.0)
        next_v = tl.load(at_v + line * v_n, mask=more & (dv < DV)[None, None, :], other=0.0)
        z = tl.sum(k * q[None, None, :], 2) * scale
        if BIAS:
            z += tl.load(Bias + b * bias_b + h * bias_h + j[None, :], mask=here[None, :], other=0.0).to(tl.float32)
        a = tl.where(here[None, :], probability(z, safe), 0.0) * sees
        dp = tl.sum(v * d_out[:, None, :], 2)
        part = a * tl.where((c == C)[:, None], 1.0, dp)
        acc += part[:, :, None] * k
        total += part
        if ROW:
            to = Part + (bh * C + c[:, None]) * n_k + j[None, :]
            tl.store(to, tl.abs(part), mask=(c < C)[:, None] & here[None, :])
    line = (bh * splits + split) * (C + 1) + c
    tl.store(Total + line, tl.sum(total, 1), mask=c <= C)
    tl.store(Acc + line[:, None] * D + d[None, :], tl.sum(acc, 1), mask=(c <= C)[:, None] & (d < D)[None, :])


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
            row = ((b * n_heads + h)[None, :] * splits + split[:, None]) * (C + 1)
            ok = (split < splits)[:, None] & s_ok[None, :]
            delta += tl.sum(tl.load(Total + row + c, mask=ok, other=0.0), 0)
            inside = ok[:, :, None] & (d < D)[None, None, :]
            to = Acc + row[:, :, None] * D + d[None, None, :]
            acc += tl.sum(tl.load(to + c * D, mask=inside, other=0.0), 0)
            plain += tl.sum(tl.load(to + C * D, mask=inside, other=0.0), 0)
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
        a = tl.where(lse == float("-inf"), 0.0, probability(z, tl.where(lse == float("-inf"), 0.0, lse)))
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
        for at in range(0, n_heads, HB):
            h = at + tl.arange(0, HB)
            to = Part + ((b * n_heads + h) * C + c)[:, None] * n_k + j[None, :]
            saliency += tl.sum(tl.load(to, mask=(h < n_heads)[:, None] & seen[None, :], other=0.0), 0)
        tl.store(Saliency + (b * C + c) * n_k + j, saliency, mask=j < n_k)


@operation("saliency_row")
def saliency_row(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_out: Tensor, scale: float, own: Tensor, start: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype | None, only_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The four results of `reference.saliency_row`."""
    batch, heads, _, size = q.shape
    n_kv, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    count, shared = d_out.shape[1], heads // n_kv
    wide, block, block_shared = power_of_two(max(size, size_v), 16), power_of_two(count + 1), power_of_two(shared)
    step, splits, warps = _config(batch * heads, keys, block * wide, multiprocessors(q.device.index))
    row = 0 if only_gradients else keys
    part = torch.empty(batch, heads, count, row, device=q.device, dtype=torch.float32)
    acc = torch.empty(batch, heads, splits, count + 1, size, device=q.device, dtype=torch.float32)
    total = torch.empty(batch, heads, splits, count + 1, device=q.device, dtype=torch.float32)
    results = _results(q, k, v, d_out, dtype, only_gradients)
    lse, d_out, own = lse.contiguous(), d_out.contiguous(), own.contiguous()
    start = None if start is None else start.contiguous()
    strides = (
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        0 if bias is None or bias.shape[1] == 1 else bias.stride(1),
    )  # fmt: skip
    constants = {
        "C": count,
        "D": size,
        "DV": size_v,
        "BD": power_of_two(size, 16),
        "BDV": power_of_two(size_v, 16),
        "START": start is not None,
        "BIAS": bias is not None,
    }
    launches["saliency_row"] += 1
    _saliency[(splits, batch * heads)](
        q, k, v, lse, d_out, own, start, bias, part, acc, total, scale, heads, n_kv, keys, splits, *strides, CB=block,
        N=step, num_warps=warps, ROW=row > 0, **constants,
    )  # fmt: skip
    grads = batch * n_kv * count
    _finish[(grads + batch * count * ceil_div(row, 128),)](
        q, k, v, lse, d_out, own, start, bias, part, acc, total, *results, scale, heads, n_kv, keys, splits, grads,
        *strides, SHARED=shared, SB=block_shared, HB=min(power_of_two(heads), 32), N=128,
        CHUNK=min(power_of_two(splits), max(1, 4096 // (block_shared * wide))), num_warps=4, **constants,
    )  # fmt: skip
    return results


def _config(rows: int, keys: int, size: int, processors: int) -> tuple[int, int, int]:
    """Keys of a step, splits of the keys, and warps, for `size` products per key.

    64 sums per thread, eight warps for each multiprocessor: in small programs, or in large ones where keys are many.
    """
    warps = 2 if keys < 2048 else 8
    step = 16 if INTERPRETED else min(16, max(1, 2048 * warps // size))
    return step, max(1, min(ceil_div(keys, step), 32, 8 * processors // (warps * rows))), warps


@saliency_row.register_fake
def _(q, k, v, lse, d_out, scale, own, start, bias, dtype, only_gradients):
    return _results(q, k, v, d_out, dtype, only_gradients)


def _results(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, dtype: torch.dtype | None, only_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, heads, size_v = d_out.shape
    shapes = (heads, q.shape[3]), (k.shape[1], q.shape[3]), (k.shape[1], size_v)
    saliency = torch.empty(batch, count, 0 if only_gradients else k.shape[2], device=q.device, dtype=torch.float32)
    dq, dk, dv = (torch.empty(batch, count, *x, device=q.device, dtype=dtype or torch.float32) for x in shapes)
    return saliency, dq, dk, dv
