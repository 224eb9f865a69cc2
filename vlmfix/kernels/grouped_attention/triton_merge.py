"""The second half of grouped attention: partial results joined by log-sum-exp, factor rule and head scales applied."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches, operation, power_of_two
from vlmfix.kernels.grouped_attention.triton import LOG2E
from vlmfix.kernels.grouped_attention.triton_ruled import no_rule, row_weights, ruled
from vlmfix.kernels.rules.triton import RULES


@triton.jit
def _merge(
    Stat, Acc, Factors, Sinks, HeadScale, Active, QPos, Arguments, Out, Masses, Lse, plane, n_batch, n_heads, n_q,
    splits, rule_plan, out_b, out_h, out_q, SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
    SB: tl.constexpr, TB: tl.constexpr, HB: tl.constexpr, DV: tl.constexpr, DB: tl.constexpr, P: tl.constexpr,
    RULE: tl.constexpr, RULED: tl.constexpr, RADIX: tl.constexpr, SIZE: tl.constexpr, PB: tl.constexpr,
    N_ARGUMENTS: tl.constexpr, FACTORS: tl.constexpr, SINKS: tl.constexpr, HEAD_SCALE: tl.constexpr, OUT: tl.constexpr,
    MASSES: tl.constexpr,
):  # fmt: skip
    """One program: one query row of one head, DB columns. HB > 1 reads the masses of all heads, for rules that pool."""
    line = tl.program_id(0).to(tl.int64)
    iq = line % n_q
    h = line // n_q % n_heads
    b = line // (n_q * n_heads)
    pos = tl.load(QPos + iq)
    heads = h + tl.zeros([HB], tl.int64) if HB == 1 else tl.arange(0, HB).to(tl.int64)
    kinds = tl.arange(0, RB)
    n_kv = n_heads // SHARED
    rows = n_q * SHARED * R
    at = (b * n_kv + heads // SHARED) * splits * rows + (iq * SHARED + heads % SHARED) * R
    part = tl.arange(0, SB)
    known = ((heads < n_heads)[:, None] & (kinds < R)[None, :])[:, None, :]

    top = tl.full([HB], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(Sinks + heads, mask=heads < n_heads, other=0.0).to(tl.float32) * LOG2E
        top = sink
    for s in range(0, splits, SB):
        where = at[:, None, None] + (s + part)[None, :, None] * rows + kinds[None, None, :]
        peak = tl.load(Stat + where, mask=known & (s + part < splits)[None, :, None], other=float("-inf"))
        top = tl.maximum(top, tl.max(tl.max(peak, 2), 1))
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.zeros([HB, RB], tl.float32)
    for s in range(0, splits, SB):
        where = at[:, None, None] + (s + part)[None, :, None] * rows + kinds[None, None, :]
        ok = known & (s + part < splits)[None, :, None]
        peak = tl.load(Stat + where, mask=ok, other=float("-inf"))
        amount = tl.load(Stat + plane + where, mask=ok, other=0.0)
        mass += tl.sum(tl.exp2(peak - top[:, None, None]) * amount, 1)
    total = tl.sum(tl.where((kinds < G)[None, :], mass, 0.0), 1)
    if SINKS:
        total += tl.exp2(sink - top)
    inverse = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    mass *= inverse[:, None]

    own = (heads == h)[:, None]
    mine = tl.sum(tl.where(own, mass, 0.0), 0)
    if MASSES:
        tl.store(Masses + line * R + kinds, mine, mask=kinds < R)
        lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("-inf"))
        tl.store(Lse + line, tl.sum(tl.where(heads == h, lse, 0.0), 0))
    if OUT:
        factor = tl.where(kinds < G, 1.0, 0.0)
        if FACTORS:
            factor = tl.load(Factors + line * R + kinds, mask=kinds < R, other=0.0)
        if RULED:
            asked = ruled(mass, kinds, heads, Arguments + b * N_ARGUMENTS, RULE, G, R, RADIX, SIZE, PB)
            asked = tl.sum(tl.where(own, asked, 0.0), 0)
            factor = tl.where(pos >= tl.load(Active + rule_plan * n_batch + b), asked, factor)
        scale = tl.sum(tl.where(heads == h, inverse, 0.0), 0)
        if HEAD_SCALE:
            for p in tl.static_range(P):
                act = pos >= tl.load(Active + p * n_batch + b)
                scale *= tl.where(act, tl.load(HeadScale + (p * n_batch + b) * n_heads + h), 1.0)
        peak_of_mine = tl.sum(tl.where(heads == h, top, 0.0), 0)
        own_at = (b * n_kv + h // SHARED) * splits * rows + (iq * SHARED + h % SHARED) * R
        d = tl.program_id(1) * DB + tl.arange(0, DB)
        t = tl.arange(0, TB)
        kind = t % RB
        factor = tl.sum(tl.where(kind[:, None] == kinds[None, :], factor[None, :], 0.0), 1)
        out = tl.zeros([DB], tl.float32)
        for s in range(0, splits, TB // RB):
            split = s + t // RB
            ok = (split < splits) & (kind < R)
            where = own_at + split * rows + kind
            weight = tl.exp2(tl.load(Stat + where, mask=ok, other=float("-inf")) - peak_of_mine) * factor
            ok = ok & (weight != 0)  # parts of no weight may never have been written
            acc = tl.load(Acc + where[:, None] * DV + d[None, :], mask=ok[:, None] & (d < DV)[None, :], other=0.0)
            out += tl.sum(weight[:, None] * acc, 0)
        tl.store(Out + b * out_b + h * out_h + iq * out_q + d, out * scale, mask=d < DV)


@triton.jit
def _merge_rows(
    Stat, Acc, Factors, Sinks, HeadScale, Active, QPos, Arguments, Out, Masses, Lse, plane, n_batch, n_heads, n_q,
    splits, rule_plan, out_b, out_h, out_q, SHARED: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
    QB: tl.constexpr, DV: tl.constexpr, DB: tl.constexpr, P: tl.constexpr, RULE: tl.constexpr, RULED: tl.constexpr,
    RADIX: tl.constexpr, SIZE: tl.constexpr, PB: tl.constexpr, N_ARGUMENTS: tl.constexpr, FACTORS: tl.constexpr,
    SINKS: tl.constexpr, HEAD_SCALE: tl.constexpr, OUT: tl.constexpr, MASSES: tl.constexpr,
):  # fmt: skip
    """As `_merge` for unsplit keys and rules that look at one head: QB query rows of one head in one program."""
    iq = tl.program_id(0) * QB + tl.arange(0, QB)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_heads
    h = bh % n_heads
    row_ok = iq < n_q
    kinds = tl.arange(0, RB)
    at = (b * (n_heads // SHARED) + h // SHARED) * n_q * SHARED * R + (iq * SHARED + h % SHARED) * R
    line = bh * n_q + iq
    ok = row_ok[:, None] & (kinds < R)[None, :]
    peak = tl.load(Stat + at[:, None] + kinds[None, :], mask=ok, other=float("-inf"))
    amount = tl.load(Stat + plane + at[:, None] + kinds[None, :], mask=ok, other=0.0)
    pos = tl.load(QPos + iq, mask=row_ok, other=0)
    factor = tl.where((kinds < G)[None, :], 1.0, 0.0) + tl.zeros([QB, RB], tl.float32)
    if FACTORS:
        factor = tl.load(Factors + line[:, None] * R + kinds[None, :], mask=ok, other=0.0)
    weight, mass, top, total = row_weights(
        peak, amount, factor, kinds, iq, pos, b, h, Sinks, HeadScale, Active, Arguments, rule_plan, n_batch, n_heads, G,
        R, RULE, RULED, RADIX, SIZE, PB, N_ARGUMENTS, SINKS, HEAD_SCALE, P,
    )  # fmt: skip
    if MASSES:
        tl.store(Masses + line[:, None] * R + kinds[None, :], mass, mask=ok)
        lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("-inf"))
        tl.store(Lse + line, lse, mask=row_ok)
    if OUT:
        d = tl.arange(0, DB)
        inside = row_ok[:, None] & (d < DV)[None, :]
        out = tl.zeros([QB, DB], tl.float32)
        for r in tl.static_range(R):
            own = tl.sum(tl.where((kinds == r)[None, :], weight, 0.0), 1)[:, None]
            out += own * tl.load(Acc + (at + r)[:, None] * DV + d[None, :], mask=inside & (own != 0), other=0.0)
        tl.store(Out + b * out_b + h * out_h + iq[:, None] * out_q + d[None, :], out, mask=inside)


@operation("grouped_merge")
def grouped_merge(
    acc: Tensor, stat: Tensor, factors: Tensor | None, sinks: Tensor | None, head_scale: Tensor | None, active: Tensor,
    q_pos: Tensor, arguments: Tensor | None, rule: str, rule_plan: int, radix: int, size: int, pooled: bool,
    n_groups: int, weighted: bool, dtype: torch.dtype, counted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Joins partial results and writes the output [B, H, Q, Dv].

    acc and stat as `grouped_split` returns them; factors [B, H, Q, R] on the kinds (None: 1 on every group, or what the
    named fused rule says); sinks [H] logits that join the denominator; head_scale [P, B, H]; active [P, B]; q_pos [Q].
    The fused rule: arguments [B, n], name ("" for none), index of its plan in `active`, place and size of the plan's
    group id within the joint id, whether it needs all heads. n_groups joint groups, doubled if weighted.

    Returns:
        The output, and where `counted` what `grouped_masses` returns, else two empty tensors.
    """
    out, masses, lse = _results(acc, stat, q_pos, n_groups, weighted, dtype, counted)
    counts = (masses, lse) if counted else (None, None)
    batch, heads, queries, _ = out.shape
    launches["grouped_merge"] += 1
    constants = {
        "RULE": RULES.get(rule, no_rule),
        "RULED": bool(rule),
        "RADIX": radix,
        "SIZE": size,
        "PB": power_of_two(size + 1),
        "N_ARGUMENTS": 0 if arguments is None else arguments.shape[1],
        "FACTORS": factors is not None,
        "HEAD_SCALE": head_scale is not None,
        "OUT": True,
        "MASSES": counted,
    }
    _launch(
        (stat, acc, factors, sinks, head_scale, active, q_pos, arguments, out, *counts), rule_plan,
        out.stride()[:3], (batch, heads, queries, n_groups, weighted, out.shape[3]), pooled,
        {"P": active.shape[0], "SINKS": sinks is not None, **constants},
    )  # fmt: skip
    return out, masses, lse


@grouped_merge.register_fake
def _(acc, stat, factors, sinks, head_scale, active, q_pos, *rest):
    return _results(acc, stat, q_pos, *rest[-4:])


@operation("grouped_masses")
def grouped_masses(
    stat: Tensor, sinks: Tensor | None, q_pos: Tensor, heads: int, n_groups: int, weighted: bool
) -> tuple[Tensor, Tensor]:
    """Masses [B, H, Q, R] and log-sum-exp [B, H, Q], float32, of partial results; parameters as in `grouped_merge`."""
    batch, queries = stat.shape[1], q_pos.shape[0]
    masses, lse = _counts(stat, q_pos, heads, n_groups, weighted)
    launches["grouped_masses"] += 1
    constants = {
        "P": 0,
        "SINKS": sinks is not None,
        "RULE": no_rule,
        "RULED": False,
        "RADIX": 1,
        "SIZE": 1,
        "PB": 1,
        "N_ARGUMENTS": 0,
        "FACTORS": False,
        "HEAD_SCALE": False,
        "OUT": False,
        "MASSES": True,
    }
    _launch(
        (stat, None, None, sinks, None, None, q_pos, None, None, masses, lse), 0, (0, 0, 0),
        (batch, heads, queries, n_groups, weighted, 1), False, constants,
    )  # fmt: skip
    return masses, lse


@grouped_masses.register_fake
def _(stat, sinks, q_pos, heads, n_groups, weighted):
    return _counts(stat, q_pos, heads, n_groups, weighted)


def _counts(stat: Tensor, q_pos: Tensor, heads: int, n_groups: int, weighted: bool) -> tuple[Tensor, Tensor]:
    batch, queries = stat.shape[1], q_pos.shape[0]
    masses = stat.new_empty(batch, heads, queries, n_groups * (2 if weighted else 1))
    return masses, stat.new_empty(batch, heads, queries)


def _results(
    acc: Tensor, stat: Tensor, q_pos: Tensor, n_groups: int, weighted: bool, dtype: torch.dtype, counted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n_kv, _, rows, size = acc.shape
    queries = q_pos.shape[0]
    heads = rows // (n_groups * (2 if weighted else 1) * queries) * n_kv
    out = acc.new_empty(batch, queries, heads, size, dtype=dtype).transpose(1, 2)
    if not counted:
        return out, stat.new_empty(0), stat.new_empty(0)
    return out, *_counts(stat, q_pos, heads, n_groups, weighted)


def _launch(
    pointers: tuple[Tensor | None, ...],
    rule_plan: int,
    strides: tuple[int, ...],
    shape: tuple[int, ...],
    pooled: bool,
    constants: dict[str, Any],
) -> None:
    batch, heads, queries, n_groups, weighted, size = shape
    stat = pointers[0]
    assert stat is not None
    splits = stat.shape[3]
    kinds = n_groups * (2 if weighted else 1)
    block = power_of_two(kinds)
    constants |= {"SHARED": heads // stat.shape[2], "G": n_groups, "R": kinds, "RB": block, "DV": size, "num_warps": 4}
    numbers = (stat[0].numel(), batch, heads, queries, splits, rule_plan, *strides)
    if splits == 1 and queries > 1 and not pooled:
        wide = power_of_two(size, 16)
        rows = min(power_of_two(queries), max(1, 4096 // wide))
        _merge_rows[(ceil_div(queries, rows), batch * heads)](*pointers, *numbers, QB=rows, DB=wide, **constants)
        return
    pool = power_of_two(heads) if pooled else 1
    part = min(power_of_two(size, 16), 64 if batch * heads * queries < 512 else 256)
    constants |= {
        "SB": min(power_of_two(splits), max(1, 4096 // (pool * block))),
        "TB": max(block, min(power_of_two(splits) * block, 64)),
        "HB": pool,
        "DB": part,
    }
    _merge[(batch * heads * queries, ceil_div(size, part))](*pointers, *numbers, **constants)
