"""Grouped attention of many query rows (prefill): tiled online softmax that reads only visible key tiles.

With a factor rule every group has a program of its own per block of rows, which visits just the tiles that hold keys
of its group; tiles that belong to the group as a whole and are visible to all rows need no mask. Without a rule one
program serves all groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, launches, power_of_two
from vlmfix.kernels.grouped_attention.arguments import common
from vlmfix.kernels.grouped_attention.triton import LOG2E, member, visible
from vlmfix.kernels.grouped_attention.visits import all_visits, owners, visits


@triton.jit
def key_scores(z, b, h, group, pos, keys, active, tables, key_slope, n_batch, n_heads, n_table, slope_heads,
               G: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr, KEY_SLOPE: tl.constexpr):  # fmt: skip
    """Scores [M, N] of one head after the slopes and biases of P plans; `group` is a number, [1, N] or [M, N]."""
    for p in tl.static_range(P):
        new = z
        if TABLES:
            at = tables + ((p * 3 * n_batch + b) * n_heads + h) * G + group
            step = n_batch * n_heads * G
            new = z * tl.where(z >= 0, tl.load(at), tl.load(at + step))
        if KEY_SLOPE:
            line = (p * n_batch + b) * slope_heads + tl.minimum(h, slope_heads - 1)
            new *= tl.load(key_slope + line * n_table + keys, mask=keys < n_table, other=1.0)[None, :]
        if TABLES:
            new += tl.load(at + 2 * step)
        if TABLES or KEY_SLOPE:
            z = tl.where((pos >= tl.load(active + p * n_batch + b))[:, None], new, z)
    return z


@triton.jit
def _tiles(
    Q, K, V, Mask, QPos, KPos, Low, High, Groups, Active, Tables, KeySlope, KeyWeight, Hidden, RollStart, scale,
    softcap, floor, n_batch, n_heads, n_kv, n_q, n_k, n_table, slope_heads, q_b, q_h, q_q, k_b, k_h, k_n, v_b, v_h, v_n,
    m_b, m_h, m_q, span_b, Order, Ranks, Owner, HeadScale, Sinks, Acc, Stat, Out, n_tiles, o_b, o_h, o_q,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr, TABLES: tl.constexpr,
    KEY_SLOPE: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr,
    CONSECUTIVE: tl.constexpr, SOFTCAP: tl.constexpr, ROLL: tl.constexpr, RADIX: tl.constexpr, SIZE: tl.constexpr,
    ROLL_GROUP: tl.constexpr, NEAREST: tl.constexpr, FARTHEST: tl.constexpr, CAST: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_SCALE: tl.constexpr, SINKS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """One program: M query rows of one head and one kind (a group, plain or weighted; DIRECT: all groups at once)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    kind = tl.program_id(2)
    b = bh // n_heads
    h = bh % n_heads
    kv = h // SHARED
    g = kind % G
    iq = block * M + tl.arange(0, M)
    row_ok = iq < n_q
    pos = tl.load(QPos + iq, mask=row_ok, other=0).to(tl.int32)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(
        Q + b * q_b + h * q_h + iq[:, None] * q_q + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0
    )
    if CAST:
        q = q.to(tl.float32)

    base = tl.load(KPos).to(tl.int32)
    first = 0
    last = n_k
    clean_first = 0
    clean_last = n_k
    low = tl.zeros([M], tl.int32)
    high = low
    if SPANS:
        low = tl.load(Low + b * span_b + iq, mask=row_ok, other=2147483647).to(tl.int32)
        high = tl.load(High + b * span_b + iq, mask=row_ok, other=0).to(tl.int32)
    if CONSECUTIVE:
        if SPANS:
            first = tl.maximum(tl.min(low, 0) - base, 0)
            last = tl.minimum(tl.max(high, 0) - base, last)
            clean_first = tl.maximum(tl.max(tl.where(row_ok, low, 0), 0) - base, 0)
            clean_last = tl.minimum(tl.min(tl.where(row_ok, high, 2147483647), 0) - base, clean_last)
        if CAUSAL:
            last = tl.minimum(tl.max(tl.where(row_ok, pos, -1), 0) + 1 - base, last)
            clean_last = tl.minimum(tl.min(tl.where(row_ok, pos, 2147483646), 0) + 1 - base, clean_last)
    elif CAUSAL or SPANS:
        clean_last = 0
    LISTED: tl.constexpr = R > 1 or (TABLES and G > 1)
    NEVER_CLEAN: tl.constexpr = MASK > 0 or (ROLL and LISTED)
    for n in tl.static_range(HIDDEN):
        at = Hidden + n * 3 * n_batch + b
        blind = tl.max(pos, 0) >= tl.load(at)
        clean_last = tl.where(blind, tl.minimum(tl.load(at + n_batch) - base, clean_last).to(tl.int32), clean_last)
    tile_first = first // N
    tile_last = tl.maximum(tl.cdiv(last, N), tile_first)
    if NEVER_CLEAN:
        clean_last = 0
    tile_a = tl.minimum(tl.maximum(tl.cdiv(clean_first, N), tile_first), tile_last)
    tile_b = tl.maximum(tl.minimum(clean_last // N, tile_last), tile_a)
    mixed = 0
    mixed_at = 0
    if LISTED:
        line = b * G + g if R > 1 else b
        ranks = Ranks + line * 2 * (n_tiles + 1)
        order = Order + line * n_tiles
        more = ranks + n_tiles + 1
        mixed_at = tl.load(ranks + n_tiles) + tl.load(more + tile_first)
        mixed = tl.load(more + tile_last) - tl.load(more + tile_first)
        tile_first = tl.load(ranks + tile_first)
        tile_last = tl.load(ranks + tile_last)
        tile_a = tl.load(ranks + tile_a)
        tile_b = tl.load(ranks + tile_b)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BDV], tl.float32)
    before = tile_a - tile_first
    after = tile_last - tile_b
    for masked in tl.static_range(NEVER_CLEAN, 2):
        count = before + after + mixed if masked else tile_b - tile_a
        for i in range(count):
            if masked:
                tile = tl.where(i < before, tile_first + i, tile_b + i - before)
                tile = tl.where(i < before + after, tile, mixed_at + i - before - after)
            else:
                tile = tile_a + i
            if LISTED:
                tile = tl.load(order + tile)
            j = tile * N + tl.arange(0, N)
            j_ok = j < n_k
            at_k = K + b * k_b + kv * k_h + j[:, None].to(tl.int64) * k_n + d[None, :]
            at_v = V + b * v_b + kv * v_h + j[:, None].to(tl.int64) * v_n + dv[None, :]
            if masked:
                k = tl.load(at_k, mask=j_ok[:, None] & (d < D)[None, :], other=0.0)
            else:
                k = tl.load(at_k, mask=(d < D)[None, :], other=0.0)
            if CAST:
                k = k.to(tl.float32)
            keys = base + j if CONSECUTIVE else tl.load(KPos + j, mask=j_ok, other=0).to(tl.int32)
            z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if SOFTCAP:
                z = softcap * (1 - 2 / (tl.exp2(z * (2 * LOG2E / softcap)) + 1))
            if masked and G > 1:
                group = member(
                    b, pos, keys, Groups, RollStart, n_table, G, ROLL, RADIX, SIZE, ROLL_GROUP, NEAREST, FARTHEST
                )
            sole = g
            if LISTED and R == 1 and not masked:
                sole = tl.load(Owner + b * n_tiles + tile).to(tl.int32)
            z = key_scores(
                z, b, h, group if masked and R == 1 and G > 1 else sole, pos, keys, Active, Tables, KeySlope, n_batch,
                n_heads, n_table, slope_heads, G, P, TABLES, KEY_SLOPE,
            )  # fmt: skip
            if masked:
                ok = visible(row_ok[:, None] & j_ok[None, :], b, pos, keys, Hidden, n_batch, CAUSAL, HIDDEN)
                if SPANS:
                    ok = ok & (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                if R > 1:
                    ok = ok & (group == g)
                if MASK > 0:
                    seen = tl.load(
                        Mask + b * m_b + h * m_h + iq[:, None] * m_q + j[None, :],
                        mask=row_ok[:, None] & j_ok[None, :],
                        other=0,
                    )
                    if MASK == 1:
                        ok = ok & (seen != 0)
                    else:
                        z += seen.to(tl.float32)
                        ok = ok & (seen.to(tl.float32) > floor)
                z = tl.where(ok, z, float("-inf"))
            new = tl.maximum(top, tl.max(z, 1) * LOG2E)
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(z * LOG2E - safe[:, None])
            if WEIGHTS:
                w = tl.load(KeyWeight + b * n_table + keys, mask=keys < n_table, other=0.0)
                p = p * tl.where(kind >= G, w, 1.0)[None, :]
            shrink = tl.exp2(top - safe)
            total = total * shrink + tl.sum(p, 1)
            if masked:
                v = tl.load(at_v, mask=j_ok[:, None] & (dv < DV)[None, :], other=0.0)
            else:
                v = tl.load(at_v, mask=(dv < DV)[None, :], other=0.0)
            if CAST:
                v = v.to(tl.float32)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new

    rows = n_q * SHARED * R
    line = (b * n_kv + kv) * rows + (iq * SHARED + h % SHARED) * R + kind
    tl.store(Stat + line, top, mask=row_ok)
    tl.store(Stat + n_batch * n_kv * rows + line, total, mask=row_ok)
    out_ok = row_ok[:, None] & (dv < DV)[None, :]
    if DIRECT:
        if SINKS:
            sink = tl.load(Sinks + h).to(tl.float32) * LOG2E
            peak = tl.maximum(top, sink)
            acc *= tl.exp2(top - peak)[:, None]
            total = total * tl.exp2(top - peak) + tl.exp2(sink - peak)
        acc *= tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        if HEAD_SCALE:
            for p in tl.static_range(P):
                act = pos >= tl.load(Active + p * n_batch + b)
                acc *= tl.where(act, tl.load(HeadScale + (p * n_batch + b) * n_heads + h), 1.0)[:, None]
        tl.store(Out + b * o_b + h * o_h + iq[:, None] * o_q + dv[None, :], acc, mask=out_ok)
    else:
        tl.store(Acc + line[:, None] * DV + dv[None, :], acc, mask=out_ok)


@torch.library.custom_op("vlmfix::grouped_tiles", mutates_args=())
def grouped_tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, low: Tensor | None,
    high: Tensor | None, groups: Tensor | None, active: Tensor, tables: Tensor | None, key_slope: Tensor | None,
    key_weight: Tensor | None, hidden: Tensor | None, roll_start: Tensor | None, scale: float, softcap: float,
    n_groups: int, rolling: list[int], causal: bool, consecutive: bool, head_scale: Tensor | None, sinks: Tensor | None,
    direct: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Partial results as from `grouped_split` with one split, or with `direct` the finished output.

    Parameters as in `arguments.common`, then head_scale [P, B, H] and sinks [H], which only `direct` applies. `direct`
    is for plans without factor rule and statistics; acc is then empty, else the output is.
    """
    leading, constants = common(
        q, k, v, mask, q_pos, k_pos, low, high, groups, active, tables, key_slope, key_weight, hidden, roll_start,
        scale, softcap, n_groups, rolling, causal, consecutive,
    )  # fmt: skip
    batch, heads, queries, _ = q.shape
    acc, stat, out = _results(q, k, v, n_groups, key_weight is not None, direct)
    kinds = stat.shape[-1] // (queries * (heads // k.shape[1]))
    config = _config(q, v)
    order = ranks = owner = None
    if groups is not None and (kinds > 1 or tables is not None):
        own = torch.nn.functional.pad(groups, (0, 1))[:, k_pos.clamp(max=groups.shape[1])]
        if roll_start is not None:
            order, ranks = all_visits(batch, own.shape[1], 1 if direct else n_groups, config["N"], k_pos.device)
        elif direct:
            order, ranks, owner = owners(own, config["N"])
        else:
            order, ranks = visits(own, n_groups, config["N"])
    launches["grouped_tiles"] += 1
    _tiles[(triton.cdiv(queries, config["M"]), batch * heads, kinds)](
        *leading, order, ranks, owner, head_scale, sinks, acc, stat, out, 0 if order is None else order.shape[2],
        *(out.stride()[:3] if direct else (0, 0, 0)), R=kinds, WEIGHTS=key_weight is not None and not direct,
        HEAD_SCALE=head_scale is not None, SINKS=sinks is not None, DIRECT=direct, **constants, **config,
    )  # fmt: skip
    return acc, stat, out


@grouped_tiles.register_fake
def _(q, k, v, mask, q_pos, k_pos, low, high, groups, active, tables, key_slope, key_weight, *rest):
    return _results(q, k, v, rest[4], key_weight is not None, rest[-1])


def _results(
    q: Tensor, k: Tensor, v: Tensor, n_groups: int, weighted: bool, direct: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    n_kv, size_v = k.shape[1], v.shape[3]
    rows = queries * (heads // n_kv) * (1 if direct else n_groups * (2 if weighted else 1))
    acc = q.new_empty((0,) if direct else (batch, n_kv, 1, rows, size_v), dtype=torch.float32)
    stat = q.new_empty(2, batch, n_kv, 1, rows, dtype=torch.float32)
    out = v.new_empty((batch, queries, heads, size_v) if direct else (0, 0, 0, 0)).transpose(1, 2)
    return acc, stat, out


def _config(q: Tensor, v: Tensor) -> dict[str, int]:
    """Launch configuration."""
    wide = max(q.shape[-1], v.shape[-1]) * q.element_size()
    exact = q.element_size() == 4  # float32 tiles of 128 rows and three stages exceed the shared memory of sm_90
    most = (64 if exact else 128) if wide <= 256 else 32 if exact else 64
    queries = power_of_two(min(q.shape[2], most), 16)
    return {
        "M": queries,
        "N": 16 if INTERPRETED else max(16, min(64, 16384 // power_of_two(wide))),
        "num_warps": 8 if queries >= 128 else 4,
        "num_stages": 3 if wide <= 256 and not exact else 2,
    }
