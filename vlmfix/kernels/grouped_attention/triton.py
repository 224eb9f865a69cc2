"""Grouped attention of few query rows (decoding): one pass over keys and values, split over the keys.

A query row of one head becomes R tile rows, one per key group; tile row r sees only the keys of its group, so that each
tile row is an ordinary online softmax and slopes and biases are constants of the row. Heads that share keys and values
lie in one tile. Every split writes maximum, sum and unnormalised output of each tile row; triton_merge.py joins them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, ceil_div, launches, multiprocessors, operation, power_of_two
from vlmfix.kernels.grouped_attention.arguments import common

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_scores(z, b, h, g, act_pos, keys, row_ok, active, tables, key_slope, n_batch, n_heads, n_table, slope_heads,
               G: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr, KEY_SLOPE: tl.constexpr):  # fmt: skip
    """Scores [M, N] after the slopes and biases of P plans; row i has head h[i], group g[i], position act_pos[i]."""
    for p in tl.static_range(P):
        new = z
        line = (p * n_batch + b) * n_heads + h
        if TABLES:
            at = ((p * 3 * n_batch + b) * n_heads + h) * G + g
            step = n_batch * n_heads * G
            up = tl.load(tables + at, mask=row_ok, other=1.0)
            down = tl.load(tables + at + step, mask=row_ok, other=1.0)
            new = z * tl.where(z >= 0, up[:, None], down[:, None])
        if KEY_SLOPE:
            line = (p * n_batch + b) * slope_heads + tl.minimum(h, slope_heads - 1)
            inside = row_ok[:, None] & (keys < n_table)[None, :]
            new *= tl.load(key_slope + line[:, None] * n_table + keys[None, :], mask=inside, other=1.0)
        if TABLES:
            new += tl.load(tables + at + 2 * step, mask=row_ok, other=0.0)[:, None]
        if TABLES or KEY_SLOPE:
            z = tl.where((act_pos >= tl.load(active + p * n_batch + b))[:, None], new, z)
    return z


@triton.jit
def visible(ok, b, pos, keys, hidden, n_batch, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr):
    """Keys [M, N] that rows at positions pos [M] see, out of `ok`: causality and hidden intervals."""
    if CAUSAL:
        ok = ok & (keys[None, :] <= pos[:, None])
    for n in tl.static_range(HIDDEN):
        at = hidden + n * 3 * n_batch + b
        blind = pos >= tl.load(at)
        inside = (keys >= tl.load(at + n_batch)) & (keys < tl.load(at + 2 * n_batch))
        ok = ok & ~(blind[:, None] & inside[None, :])
    return ok


@triton.jit
def member(b, pos, keys, groups, roll_start, n_table, G: tl.constexpr, ROLL: tl.constexpr, RADIX: tl.constexpr,
           SIZE: tl.constexpr, ROLL_GROUP: tl.constexpr, NEAREST: tl.constexpr, FARTHEST: tl.constexpr):  # fmt: skip
    """Joint group of each key, [1, N] or with a rolling group [M, N]."""
    if G == 1:
        return tl.zeros_like(keys).to(tl.int32)[None, :]
    of = tl.load(groups + b * n_table + keys, mask=keys < n_table, other=0).to(tl.int32)[None, :]
    if ROLL:
        distance = pos[:, None] - keys[None, :]
        inside = (distance >= NEAREST) & (distance <= FARTHEST) & (keys >= tl.load(roll_start + b))[None, :]
        of = tl.where(inside, of + (ROLL_GROUP - of // RADIX % SIZE) * RADIX, of)
    return of


@triton.jit
def _split(
    Q, K, V, Mask, QPos, KPos, Low, High, Groups, Active, Tables, KeySlope, KeyWeight, Hidden, RollStart, scale,
    softcap, floor, n_batch, n_heads, n_kv, n_q, n_k, n_table, slope_heads, q_b, q_h, q_q, k_b, k_h, k_n, v_b, v_h, v_n,
    m_b, m_h, m_q, span_b, Acc, Stat, splits, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    HIDDEN: tl.constexpr, TABLES: tl.constexpr, KEY_SLOPE: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, CONSECUTIVE: tl.constexpr, SOFTCAP: tl.constexpr, ROLL: tl.constexpr,
    RADIX: tl.constexpr, SIZE: tl.constexpr, ROLL_GROUP: tl.constexpr, NEAREST: tl.constexpr, FARTHEST: tl.constexpr,
    CAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M tile rows of one key/value head over one split of the keys."""
    split = tl.program_id(0)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // n_kv
    kv = bh % n_kv
    rows = n_q * SHARED * R
    row = tl.program_id(1) * M + tl.arange(0, M)
    row_ok = row < rows
    kind = row % R
    g = kind % G
    h = kv * SHARED + row // R % SHARED
    iq = row // (R * SHARED)
    pos = tl.load(QPos + iq, mask=row_ok, other=0).to(tl.int32)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(
        Q + b * q_b + h[:, None] * q_h + iq[:, None] * q_q + d[None, :],
        mask=row_ok[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if CAST:
        q = q.to(tl.float32)

    first = 0
    last = n_k
    base = tl.load(KPos).to(tl.int32)
    if SPANS:
        low = tl.load(Low + b * span_b + iq, mask=row_ok, other=2147483647).to(tl.int32)
        high = tl.load(High + b * span_b + iq, mask=row_ok, other=0).to(tl.int32)
    if CONSECUTIVE:
        if SPANS:
            first = tl.maximum(tl.min(low, 0) - base, 0) // 16 * 16
            last = tl.minimum(tl.max(high, 0) - base, last)
        if CAUSAL:
            last = tl.minimum(tl.max(tl.where(row_ok, pos, 0), 0) + 1 - base, last)
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), splits), 16) * 16
    begin = first + split * each
    end = tl.minimum(begin + each, last)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BDV], tl.float32)
    for start in range(begin, end, N):
        j = start + tl.arange(0, N)
        here = j < end
        k = tl.load(
            K + b * k_b + kv * k_h + j[:, None].to(tl.int64) * k_n + d[None, :],
            mask=here[:, None] & (d < D)[None, :],
            other=0.0,
        )
        v = tl.load(
            V + b * v_b + kv * v_h + j[:, None].to(tl.int64) * v_n + dv[None, :],
            mask=here[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        if CAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        keys = base + j if CONSECUTIVE else tl.load(KPos + j, mask=here, other=0).to(tl.int32)
        z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:
            z = softcap * (1 - 2 / (tl.exp2(z * (2 * LOG2E / softcap)) + 1))
        z = row_scores(
            z,
            b,
            h,
            g,
            pos,
            keys,
            row_ok,
            Active,
            Tables,
            KeySlope,
            n_batch,
            n_heads,
            n_table,
            slope_heads,
            G,
            P,
            TABLES,
            KEY_SLOPE,
        )
        ok = visible(row_ok[:, None] & here[None, :], b, pos, keys, Hidden, n_batch, CAUSAL, HIDDEN)
        if SPANS:
            ok = ok & (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
        if G > 1:
            ok = ok & (
                member(b, pos, keys, Groups, RollStart, n_table, G, ROLL, RADIX, SIZE, ROLL_GROUP, NEAREST, FARTHEST)
                == g[:, None]
            )
        if MASK > 0:
            seen = tl.load(
                Mask + b * m_b + h[:, None] * m_h + iq[:, None] * m_q + j[None, :],
                mask=row_ok[:, None] & here[None, :],
                other=0,
            )
            if MASK == 1:
                ok = ok & (seen != 0)
            else:
                z += seen.to(tl.float32)
                ok = ok & (seen.to(tl.float32) > floor)
        z = tl.where(ok, z * LOG2E, float("-inf"))
        new = tl.maximum(top, tl.max(z, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(z - safe[:, None])
        if WEIGHTS:
            w = tl.load(KeyWeight + b * n_table + keys, mask=keys < n_table, other=0.0)
            p = tl.where((kind >= G)[:, None], p * w[None, :], p)
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new

    line = (bh * splits + split) * rows + row
    tl.store(Stat + line, top, mask=row_ok)
    tl.store(Stat + n_batch * n_kv * splits * rows + line, total, mask=row_ok)
    tl.store(Acc + line[:, None] * DV + dv[None, :], acc, mask=row_ok[:, None] & (dv < DV)[None, :])


@operation("grouped_split")
def grouped_split(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, low: Tensor | None,
    high: Tensor | None, groups: Tensor | None, active: Tensor, tables: Tensor | None, key_slope: Tensor | None,
    key_weight: Tensor | None, hidden: Tensor | None, roll_start: Tensor | None, scale: float, softcap: float,
    n_groups: int, rolling: list[int], causal: bool, consecutive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial results of all query rows; parameters as in `arguments.common`.

    Returns:
        acc [B, Hkv, S, rows, Dv] float32 unnormalised outputs and stat [2, B, Hkv, S, rows] float32, maximum (base 2)
        and sum, for S splits and rows = Q * (H / Hkv) * R, R fastest.
    """
    leading, constants = common(
        q, k, v, mask, q_pos, k_pos, low, high, groups, active, tables, key_slope, key_weight, hidden, roll_start,
        scale, softcap, n_groups, rolling, causal, consecutive,
    )  # fmt: skip
    kinds = n_groups * (1 if key_weight is None else 2)
    rows, splits, config = _shapes(q, k, v, kinds)
    batch, n_kv = k.shape[:2]
    acc = torch.empty(batch, n_kv, splits, rows, v.shape[3], device=q.device, dtype=torch.float32)
    stat = torch.empty(2, batch, n_kv, splits, rows, device=q.device, dtype=torch.float32)
    launches["grouped_split"] += 1
    _split[(splits, ceil_div(rows, config["M"]), batch * n_kv)](
        *leading, acc, stat, splits, R=kinds, WEIGHTS=key_weight is not None, **constants, **config
    )
    return acc, stat


@grouped_split.register_fake
def _(q, k, v, mask, q_pos, k_pos, low, high, groups, active, tables, key_slope, key_weight, *rest):
    rows, splits, _ = _shapes(q, k, v, rest[4] * (1 if key_weight is None else 2))
    batch, n_kv = k.shape[:2]
    acc = q.new_empty(batch, n_kv, splits, rows, v.shape[3], dtype=torch.float32)
    return acc, q.new_empty(2, batch, n_kv, splits, rows, dtype=torch.float32)


def _shapes(q: Tensor, k: Tensor, v: Tensor, kinds: int) -> tuple[int, int, dict[str, int]]:
    """Tile rows, number of splits and launch configuration."""
    return _choice(*q.shape, *k.shape[1:3], v.shape[3], kinds, q.element_size(), multiprocessors(q.device.index))


@cache
def _choice(
    batch: int, heads: int, queries: int, size: int, n_kv: int, keys: int, size_v: int, kinds: int, bytes_each: int,
    processors: int,
) -> tuple[int, int, dict[str, int]]:  # fmt: skip
    rows = queries * (heads // n_kv) * kinds
    wide = max(size, size_v) * bytes_each
    tile = power_of_two(min(rows, 64 if bytes_each == 2 else 32), 16)
    most = 64 if heads == n_kv or keys < 2048 else 32  # shared keys: more work per byte, which short steps overlap
    step = 16 if INTERPRETED else max(16, min(most, 16384 // power_of_two(wide)))
    slots = 3 * processors
    work = batch * n_kv * ceil_div(rows, tile)
    splits = max(1, min(ceil_div(keys, step), max(slots // work, min(4 * slots // work, keys // 512))))
    return rows, splits, {"M": tile, "N": step, "num_warps": 4, "num_stages": 3 if wide <= 256 else 2}
