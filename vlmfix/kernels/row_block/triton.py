"""Row block and column mass on the GPU: no tensor of queries times keys beyond what is asked for."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches, multiprocessors, must_cast, operation, power_of_two, precision

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def probabilities(
    Q, K, Lse, QPos, Start, Mask, Bias, scale, b, kv, h, iq, key, row_ok, here, n_heads, n_q, q_b, q_h, q_q, k_b, k_h,
    k_n, p_b, m_b, m_q, bias_b, bias_h, D: tl.constexpr, BD: tl.constexpr, CAUSAL: tl.constexpr, START: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, CAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax probabilities [M, N] of rows (h[i], iq[i]) over keys `key` [N] of head kv."""
    d = tl.arange(0, BD)
    q = tl.load(
        Q + b * q_b + h[:, None] * q_h + iq[:, None] * q_q + d[None, :],
        mask=row_ok[:, None] & (d < D)[None, :],
        other=0.0,
    )
    k = tl.load(
        K + b * k_b + kv * k_h + key[:, None] * k_n + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0
    )
    if CAST:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    lse = tl.load(Lse + (b * n_heads + h) * n_q + iq, mask=row_ok, other=float("-inf")).to(tl.float32)
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BIAS:
        at = Bias + b * bias_b + h[:, None] * bias_h + key[None, :]
        z += tl.load(at, mask=row_ok[:, None] & here[None, :], other=0.0).to(tl.float32)
    ok = (row_ok & (lse != float("-inf")))[:, None] & here[None, :]
    if CAUSAL:
        ok = ok & (key[None, :] <= tl.load(QPos + b * p_b + iq, mask=row_ok, other=-1)[:, None])
    if START:
        ok = ok & (key >= tl.load(Start + b))[None, :]
    if MASK:
        ok = ok & (
            tl.load(Mask + b * m_b + iq[:, None] * m_q + key[None, :], mask=row_ok[:, None] & here[None, :], other=0)
            != 0
        )
    safe = tl.where(lse == float("-inf"), 0.0, lse)
    return tl.where(ok, tl.exp2((z - safe[:, None]) * LOG2E), 0.0)


@triton.jit
def _row_block(
    Q, K, Lse, QPos, Start, Mask, Bias, Index, Out, scale, n_heads, n_kv, n_q, n, chunk, q_b, q_h, q_q, k_b, k_h, k_n,
    p_b, m_b, m_q, bias_b, bias_h, D: tl.constexpr, BD: tl.constexpr, SHARED: tl.constexpr, SB: tl.constexpr,
    QB: tl.constexpr, N: tl.constexpr, INDEX: tl.constexpr, REDUCE: tl.constexpr, CAUSAL: tl.constexpr,
    START: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: QB rows, N keys, `chunk` key heads with the query heads that share them as tile rows."""
    part = tl.program_id(2).to(tl.int64)
    parts = (n_kv + chunk - 1) // chunk
    b = part // parts
    part = part % parts
    row = tl.arange(0, SB * QB)
    iq = tl.program_id(1) * QB + row % QB
    shared = row // QB
    row_ok = (iq < n_q) & (shared < SHARED)
    j = tl.program_id(0) * N + tl.arange(0, N)
    here = j < n
    key = tl.load(Index + b * n + j, mask=here, other=0).to(tl.int64) if INDEX else j.to(tl.int64)
    line = tl.program_id(1) * QB + tl.arange(0, QB)
    acc = tl.zeros([QB, N], tl.float32)
    for kv in range(part * chunk, tl.minimum(part * chunk + chunk, n_kv)):
        h = kv * SHARED + shared
        p = probabilities(
            Q, K, Lse, QPos, Start, Mask, Bias, scale, b, kv, h, iq, key, row_ok, here, n_heads, n_q, q_b, q_h, q_q,
            k_b, k_h, k_n, p_b, m_b, m_q, bias_b, bias_h, D, BD, CAUSAL, START, MASK, BIAS, CAST, PRECISION,
        )  # fmt: skip
        if REDUCE == 0:
            at = Out + ((b * n_heads + h)[:, None] * n_q + iq[:, None]) * n + j[None, :]
            tl.store(at, p, mask=row_ok[:, None] & here[None, :])
        elif REDUCE == 1:
            acc += tl.sum(tl.reshape(p, (SB, QB, N)), 0)
        else:
            acc = tl.maximum(acc, tl.max(tl.reshape(p, (SB, QB, N)), 0))
    if REDUCE > 0:
        at = Out + ((b * parts + part) * n_q + line[:, None]) * n + j[None, :]
        tl.store(at, acc, mask=(line < n_q)[:, None] & here[None, :])


@triton.jit
def _column_mass(
    Q, K, Lse, QPos, Start, Mask, Weight, Out, scale, n_heads, n_kv, n_q, n, q_b, q_h, q_q, k_b, k_h, k_n, p_b, m_b,
    m_q, D: tl.constexpr, BD: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WEIGHT: tl.constexpr, CAUSAL: tl.constexpr, START: tl.constexpr, MASK: tl.constexpr, CAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: N keys of one query head, all queries."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_heads
    h = bh % n_heads
    j = tl.program_id(0) * N + tl.arange(0, N)
    here = j < n
    key = j.to(tl.int64)
    acc = tl.zeros([N], tl.float32)
    for at in range(0, n_q, M):
        iq = at + tl.arange(0, M)
        row_ok = iq < n_q
        p = probabilities(
            Q, K, Lse, QPos, Start, Mask, Mask, scale, b, h // SHARED, h + tl.zeros([M], tl.int64), iq, key, row_ok,
            here, n_heads, n_q, q_b, q_h, q_q, k_b, k_h, k_n, p_b, m_b, m_q, 0, 0, D, BD, CAUSAL, START, MASK, False,
            CAST, PRECISION,
        )  # fmt: skip
        if WEIGHT:
            p *= tl.load(Weight + b * n_q + iq, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(p, 0)
    tl.store(Out + bh * n + j, acc, mask=here)


@operation("row_block")
def row_block(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, reduce: str, index: Tensor | None, q_pos: Tensor | None,
    start: Tensor | None, mask: Tensor | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `reference.row_block`, with reduce "" for none."""
    batch, heads, rows, _ = q.shape
    n_kv, n = k.shape[1], k.shape[2] if index is None else index.shape[1]
    shared = heads // n_kv
    shared_block = power_of_two(shared)
    tall = 64 if q.element_size() == 2 else 32
    row_block = min(power_of_two(rows, max(1, 16 // shared_block)), max(1, tall // shared_block))
    step = max(16, min(64, 16384 // power_of_two(q.shape[3] * q.element_size())))
    grid = ceil_div(n, step), ceil_div(rows, row_block)
    fill = ceil_div(2 * multiprocessors(q.device.index), grid[0] * grid[1] * batch)
    chunk = ceil_div(n_kv, min(n_kv, fill)) if reduce else 1
    parts = ceil_div(n_kv, chunk)
    out = lse.new_empty(batch, parts if reduce else heads, rows, n, dtype=torch.float32)
    launches["row_block"] += 1
    _row_block[(*grid, batch * parts)](
        *_pointers(q, k, lse, q_pos, start, mask), bias, index, out, scale, heads, n_kv, rows, n, chunk,
        *_strides(q, k, q_pos, mask), *((0, 0) if bias is None else _broadcast(bias)), SHARED=shared, SB=shared_block,
        QB=row_block, N=step, INDEX=index is not None, REDUCE={"": 0, "sum": 1, "mean": 1, "max": 2}[reduce],
        BIAS=bias is not None, **_constants(q, q_pos, start, mask),
    )  # fmt: skip
    if not reduce:
        return out
    out = out.amax(1) if reduce == "max" else out.sum(1)
    return out / heads if reduce == "mean" else out


@row_block.register_fake
def _(q, k, lse, scale, reduce, index, q_pos, start, mask, bias):
    n = k.shape[2] if index is None else index.shape[1]
    shape = (q.shape[0], q.shape[2], n) if reduce else (*q.shape[:3], n)
    return lse.new_empty(shape, dtype=torch.float32)


@operation("column_mass")
def column_mass(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, q_pos: Tensor | None, start: Tensor | None, mask: Tensor | None,
    weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `reference.column_mass` with all heads kept: [B, H, K]."""
    batch, heads, queries, size = q.shape
    n_kv, n = k.shape[1], k.shape[2]
    out = lse.new_empty(batch, heads, n, dtype=torch.float32)
    launches["column_mass"] += 1
    wide = size * q.element_size()
    _column_mass[(ceil_div(n, 64 if wide <= 256 else 32), batch * heads)](
        *_pointers(q, k, lse, q_pos, start, mask), weight, out, scale, heads, n_kv, queries, n,
        *_strides(q, k, q_pos, mask), SHARED=heads // n_kv, M=min(power_of_two(queries, 16), 64 if wide <= 256 else 32),
        N=64 if wide <= 256 else 32, WEIGHT=weight is not None, **_constants(q, q_pos, start, mask),
    )  # fmt: skip
    return out


@column_mass.register_fake
def _(q, k, lse, scale, q_pos, start, mask, weight):
    return lse.new_empty(q.shape[0], q.shape[1], k.shape[2], dtype=torch.float32)


def _pointers(
    q: Tensor, k: Tensor, lse: Tensor, q_pos: Tensor | None, start: Tensor | None, mask: Tensor | None
) -> tuple[Any, ...]:
    return (
        q,
        k,
        lse.contiguous(),
        q_pos,
        start,
        None if mask is None else mask.expand(q.shape[0], -1, -1).view(torch.uint8),
    )


def _strides(q: Tensor, k: Tensor, q_pos: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    of_pos = 0 if q_pos is None or q_pos.ndim == 1 else q_pos.stride(0)
    of_mask = (0, 0) if mask is None else mask.expand(q.shape[0], -1, -1).stride()[:2]
    return (*q.stride()[:3], *k.stride()[:3], of_pos, *of_mask)


def _broadcast(bias: Tensor) -> tuple[int, int]:
    return 0 if bias.shape[0] == 1 else bias.stride(0), 0 if bias.shape[1] == 1 else bias.stride(1)


def _constants(q: Tensor, q_pos: Tensor | None, start: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    return {
        "D": q.shape[3],
        "BD": power_of_two(q.shape[3], 16),
        "CAUSAL": q_pos is not None,
        "START": start is not None,
        "MASK": mask is not None,
        "CAST": must_cast(q.dtype),
        "PRECISION": precision(q.dtype),
    }
