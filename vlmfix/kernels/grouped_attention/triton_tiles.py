"""Grouped attention of many query rows (prefill, or a few dozen rows): tiled online softmax over visible keys.

A program takes a block of query rows of one head through the key groups one after the other. A tile of keys is gathered
from the list of the group's keys, so that no tile holds keys of two groups; tiles that all rows see need no mask. With
a factor rule that looks at one head, the parts of all groups but the last wait in a scratch of the program, which stays
in the L2 cache, until the masses are known; programs then take block after block, so that the scratch is small. Where
there are too few blocks to fill the machine the keys are split and every group has programs of its own; triton_merge.py
joins the parts, as it does for rules that look at all heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmfix.kernels.grouped_attention.triton import LOG2E, member, visible
from vlmfix.kernels.grouped_attention.triton_ruled import row_weights


@triton.jit
def key_scores(z, b, h, group, pos, keys, active, tables, key_slope, n_batch, n_heads, n_table, slope_heads,
               G: tl.constexpr, P: tl.constexpr, TABLES: tl.constexpr, KEY_SLOPE: tl.constexpr):  # fmt: skip
    """Scores [M, N] of one head, base 2, after slopes and biases of P plans; `group` is a number, [1, N] or [M, N]."""
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
            new += tl.load(at + 2 * step) * LOG2E
        if TABLES or KEY_SLOPE:
            z = tl.where((pos >= tl.load(active + p * n_batch + b))[:, None], new, z)
    return z


@triton.jit
def tiles_kernel(
    Q, K, V, Mask, QPos, KPos, Low, High, Groups, Active, Tables, KeySlope, KeyWeight, Hidden, RollStart, scale,
    softcap, floor, n_batch, n_heads, n_kv, n_q, n_k, n_table, slope_heads, q_b, q_h, q_q, k_b, k_h, k_n, v_b, v_h, v_n,
    m_b, m_h, m_q, span_b, Order, Ranks, Counter, HeadScale, Sinks, Arguments, Scratch, Acc, Stat, Out, n_items, splits,
    rule_plan, o_b, o_h, o_q,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, P: tl.constexpr, HIDDEN: tl.constexpr,
    TABLES: tl.constexpr, SIGNED: tl.constexpr, KEY_SLOPE: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SPANS: tl.constexpr, CONSECUTIVE: tl.constexpr, SOFTCAP: tl.constexpr, ROLL: tl.constexpr,
    RADIX: tl.constexpr, SIZE: tl.constexpr, ROLL_GROUP: tl.constexpr, NEAREST: tl.constexpr, FARTHEST: tl.constexpr,
    CAST: tl.constexpr, PRECISION: tl.constexpr, HEAD_SCALE: tl.constexpr, SINKS: tl.constexpr, RULE: tl.constexpr,
    RULE_RADIX: tl.constexpr, RULE_SIZE: tl.constexpr, PB: tl.constexpr, N_ARGUMENTS: tl.constexpr,
    FINISH: tl.constexpr,
):  # fmt: skip
    """One program: blocks of M query rows of one head, each over one split of every group's keys.

    FINISH: writes the output. Else the partial results of R kinds, or of all keys together if R is 1.
    """
    LISTED: tl.constexpr = (R > 1 or (TABLES and G > 1)) and not ROLL
    NEVER_CLEAN: tl.constexpr = MASK > 0 or (ROLL and (R > 1 or TABLES))
    STEPS: tl.constexpr = R if R > 1 else G if LISTED else 1
    APART: tl.constexpr = R > 1 and not FINISH
    ROW_TABLES: tl.constexpr = TABLES and P == 1 and not KEY_SLOPE and not SOFTCAP and not (ROLL and R == 1)
    FOLD: tl.constexpr = not TABLES and not KEY_SLOPE and not SOFTCAP and MASK != 2
    PERSIST: tl.constexpr = FINISH and R > 1
    unit = scale * LOG2E
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    kinds = tl.arange(0, RB)
    base = tl.load(KPos).to(tl.int32)
    blocks = tl.cdiv(n_q, M)
    split = tl.program_id(1)
    item = tl.program_id(0)
    while item < n_items:
        bh = (item // blocks).to(tl.int64)
        b = bh // n_heads
        h = bh % n_heads
        kv = h // SHARED
        iq = (blocks - 1 - item % blocks) * M + tl.arange(0, M)
        row_ok = iq < n_q
        pos = tl.load(QPos + iq, mask=row_ok, other=0).to(tl.int32)
        q = tl.load(
            Q + b * q_b + h * q_h + iq[:, None] * q_q + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0
        )
        if CAST:
            q = q.to(tl.float32)

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
        for n in tl.static_range(HIDDEN):
            at = Hidden + n * 3 * n_batch + b
            blind = tl.max(pos, 0) >= tl.load(at)
            clean_last = tl.where(blind, tl.minimum(tl.load(at + n_batch) - base, clean_last).to(tl.int32), clean_last)
        last = tl.maximum(last, 0)
        first = tl.minimum(first, last)
        clean_first = tl.minimum(tl.maximum(clean_first, first), last)
        clean_last = tl.minimum(tl.maximum(clean_last, clean_first), last)
        if NEVER_CLEAN:
            clean_first = first
            clean_last = first

        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BDV], tl.float32)
        tops = tl.full([M, RB], float("-inf"), tl.float32)
        totals = tl.zeros([M, RB], tl.float32)
        waiting = 0
        rows = n_q * SHARED * R
        out_ok = row_ok[:, None] & (dv < DV)[None, :]
        if PERSIST:
            scratch = Scratch + tl.program_id(0).to(tl.int64) * (R - 1) * M * BDV
            scratch += tl.arange(0, M)[:, None] * BDV + dv[None, :]
        for step in range(tl.program_id(2) if APART else 0, tl.program_id(2) + 1 if APART else STEPS):
            kind = step if APART or R == 1 else (step + 1) % R  # kind 0, mostly the largest, stays in registers
            g = kind % G
            if R > 1:
                top = tl.full([M], float("-inf"), tl.float32)
                total = tl.zeros([M], tl.float32)
                acc = tl.zeros([M, BDV], tl.float32)
            e_first = first + 0
            e_a = clean_first + 0
            e_b = clean_last + 0
            e_last = last + 0
            if LISTED:
                order = Order + (b * G + g) * n_k
                ranks = Ranks + (b * G + g) * (n_k + 1)
                e_first = tl.load(ranks + first)
                e_a = tl.load(ranks + clean_first)
                e_b = tl.load(ranks + clean_last)
                e_last = tl.load(ranks + last)
            each = tl.cdiv(tl.cdiv(e_last - e_first, splits), N) * N
            e_first = tl.minimum(e_first + split * each, e_last)
            e_last = tl.minimum(e_first + each, e_last)
            e_a = tl.minimum(tl.maximum(e_a, e_first), e_last)
            e_b = tl.minimum(tl.maximum(e_b, e_a), e_last)
            clean = (e_b - e_a) // N
            rest = e_a + clean * N
            before = tl.cdiv(e_a - e_first, N)
            after = tl.cdiv(e_last - rest, N)
            if ROW_TABLES:
                at = Tables + (b * n_heads + h) * G + g
                aside = n_batch * n_heads * G
                act = pos >= tl.load(Active + b)
                up = tl.where(act, tl.load(at), 1.0) * unit
                down = tl.where(act, tl.load(at + aside), 1.0) * unit
                shift = tl.where(act, tl.load(at + 2 * aside), 0.0) * LOG2E
            for masked in tl.static_range(NEVER_CLEAN, 2):
                count = before + after if masked else clean
                start = e_a
                stop = e_last
                if masked:
                    start = tl.where(before > 0, e_first, rest)
                    stop = tl.where(before > 0, e_a, e_last)
                if LISTED:
                    entry = start + tl.arange(0, N)
                    ahead = tl.load(order + entry, mask=entry < stop, other=0)
                for i in range(count):
                    if masked:
                        start = tl.where(i < before, e_first + i * N, rest + (i - before) * N)
                        stop = tl.where(i < before, e_a, e_last)
                    else:
                        start = e_a + i * N
                    entry = start + tl.arange(0, N)
                    here = entry < stop
                    if LISTED:
                        j = ahead
                        if masked:
                            start = tl.where(i + 1 < before, e_first + (i + 1) * N, rest + (i + 1 - before) * N)
                            stop = tl.where(i + 1 < before, e_a, e_last)
                        else:
                            start += N
                        entry = start + tl.arange(0, N)
                        ahead = tl.load(order + entry, mask=entry < stop, other=0)  # one step ahead of its keys
                    else:
                        j = entry
                    at_k = K + b * k_b + kv * k_h + j[:, None].to(tl.int64) * k_n + d[None, :]
                    at_v = V + b * v_b + kv * v_h + j[:, None].to(tl.int64) * v_n + dv[None, :]
                    if masked:
                        k = tl.load(at_k, mask=here[:, None] & (d < D)[None, :], other=0.0)
                    else:
                        k = tl.load(at_k, mask=(d < D)[None, :], other=0.0)
                    if CAST:
                        k = k.to(tl.float32)
                    keys = base + j if CONSECUTIVE else tl.load(KPos + j, mask=here, other=0).to(tl.int32)
                    z = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    if ROLL and (R > 1 or TABLES):
                        group = member(
                            b, pos, keys, Groups, RollStart, n_table, G, ROLL, RADIX, SIZE, ROLL_GROUP, NEAREST,
                            FARTHEST,
                        )  # fmt: skip
                    if SOFTCAP:
                        z = softcap * LOG2E * (1 - 2 / (tl.exp2(z * (2 * unit / softcap)) + 1))
                    elif not FOLD and not ROW_TABLES:
                        z *= unit
                    if ROW_TABLES:
                        if SIGNED:
                            z = z * tl.where(z >= 0, up[:, None], down[:, None]) + shift[:, None]
                        else:
                            z = z * up[:, None] + shift[:, None]
                    else:
                        z = key_scores(
                            z, b, h, group if ROLL and TABLES and R == 1 else g, pos, keys, Active, Tables, KeySlope,
                            n_batch, n_heads, n_table, slope_heads, G, P, TABLES, KEY_SLOPE,
                        )  # fmt: skip
                    if masked:
                        ok = visible(row_ok[:, None] & here[None, :], b, pos, keys, Hidden, n_batch, CAUSAL, HIDDEN)
                        if SPANS:
                            ok = ok & (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
                        if ROLL and R > 1:
                            ok = ok & (group == g)
                        if MASK > 0:
                            seen = tl.load(
                                Mask + b * m_b + h * m_h + iq[:, None] * m_q + j[None, :],
                                mask=row_ok[:, None] & here[None, :],
                                other=0,
                            )
                            if MASK == 1:
                                ok = ok & (seen != 0)
                            else:
                                z += seen.to(tl.float32) * LOG2E
                                ok = ok & (seen.to(tl.float32) > floor)
                        z = tl.where(ok, z, float("-inf"))
                    peak = tl.max(z, 1)
                    new = tl.maximum(top, peak * unit if FOLD else peak)
                    safe = tl.where(new == float("-inf"), 0.0, new) if masked else new
                    p = tl.exp2(z * unit - safe[:, None] if FOLD else z - safe[:, None])
                    if WEIGHTS:
                        w = tl.load(KeyWeight + b * n_table + keys, mask=keys < n_table, other=0.0)
                        p = p * tl.where(kind >= G, w, 1.0)[None, :]
                    shrink = tl.exp2(top - safe)
                    total = total * shrink + tl.sum(p, 1)
                    if masked:
                        v = tl.load(at_v, mask=here[:, None] & (dv < DV)[None, :], other=0.0)
                    else:
                        v = tl.load(at_v, mask=(dv < DV)[None, :], other=0.0)
                    if CAST:
                        v = v.to(tl.float32)
                    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
                    top = new
            visited = before + after + clean > 0
            if PERSIST:
                mine = (kinds == kind)[None, :]
                tops = tl.where(mine, top[:, None], tops)
                totals = tl.where(mine, total[:, None], totals)
                if visited & (kind > 0):
                    waiting |= 1 << kind
                    share = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
                    tl.store(scratch + (kind - 1) * M * BDV, (acc * share[:, None]).to(Scratch.dtype.element_ty))
            elif R > 1:
                line = ((b * n_kv + kv) * splits + split) * rows + (iq * SHARED + h % SHARED) * R + kind
                tl.store(Stat + line, top, mask=row_ok)
                tl.store(Stat + n_batch * n_kv * splits * rows + line, total, mask=row_ok)
                if visited:
                    tl.store(Acc + line[:, None] * DV + dv[None, :], acc, mask=out_ok)

        if FINISH:
            if R == 1:
                tops = tl.where((kinds == 0)[None, :], top[:, None], tops)
                totals = tl.where((kinds == 0)[None, :], total[:, None], totals)
            factor = tl.full([M, RB], 1.0, tl.float32)
            weight, _, _, _ = row_weights(
                tops, totals, factor, kinds, iq, pos, b, h, Sinks, HeadScale, Active, Arguments, rule_plan, n_batch,
                n_heads, 1 if R == 1 else G, R, RULE, R > 1, RULE_RADIX, RULE_SIZE, PB, N_ARGUMENTS, SINKS, HEAD_SCALE,
                P,
            )  # fmt: skip
            acc *= tl.sum(tl.where((kinds == 0)[None, :], weight, 0.0), 1)[:, None]
            if R > 1:
                tl.debug_barrier()
                weight *= totals
                for r in range(1, R):
                    if (waiting >> r) & 1:
                        part = tl.load(scratch + (r - 1) * M * BDV).to(tl.float32)
                        acc += tl.sum(tl.where((kinds == r)[None, :], weight, 0.0), 1)[:, None] * part
                tl.debug_barrier()
            tl.store(Out + b * o_b + h * o_h + iq[:, None] * o_q + dv[None, :], acc, mask=out_ok)
        elif R == 1:
            line = ((b * n_kv + kv) * splits + split) * rows + iq * SHARED + h % SHARED
            tl.store(Stat + line, top, mask=row_ok)
            tl.store(Stat + n_batch * n_kv * splits * rows + line, total, mask=row_ok)
            tl.store(Acc + line[:, None] * DV + dv[None, :], acc, mask=out_ok)
        item = tl.num_programs(0) + tl.atomic_add(Counter, 1) if PERSIST else n_items
