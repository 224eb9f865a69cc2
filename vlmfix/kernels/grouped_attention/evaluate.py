"""Grouped attention through the Triton kernels: packs plans, runs partial results and merge, hands out statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous
from vlmfix.kernels.grouped_attention import pack as packing
from vlmfix.kernels.grouped_attention.pack import Packed
from vlmfix.kernels.grouped_attention.tiles import grouped_tiles
from vlmfix.kernels.grouped_attention.triton import grouped_split
from vlmfix.kernels.grouped_attention.triton_merge import grouped_masses, grouped_merge
from vlmfix.kernels.rules import fused_form
from vlmfix.plan import Plan

SPLIT_ROWS = 128
"""Most tile rows per key/value head that the split kernel takes; with more, the tile kernel visits fewer keys."""

WORKSPACE = 1 << 28
"""Most bytes of partial results at once; longer prefills run in chunks of rows."""

NO_RULE: tuple[Any, ...] = (None, "", 0, 1, 1, False)
"""As `_fused` returns it where no plan has a rule."""


def evaluate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    mask: Tensor | None,
    scale: float,
    q_pos: Tensor,
    k_pos: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    *,
    spans: tuple[Tensor, Tensor] | None = None,
    consecutive: bool = False,
    packed: Packed | None = None,
) -> Tensor:
    """Grouped attention on the kernels; arguments up to `causal` and the result as in `reference.grouped_attention`.

    Args:
        q: [B, H, Q, D].
        k: [B, Hkv, K, D].
        v: [B, Hkv, K, Dv].
        plans: at least one; `pack.unsupported` must have passed them.
        mask: bool or additive float; None for causal.
        scale: factor on q.k.
        q_pos: [Q].
        k_pos: [K].
        softcap: soft cap of the scores.
        sinks: [H].
        causal: whether an absent mask means causal.
        spans: first visible slot and slot after the last, each [B or 1, Q], beyond what mask and causality say.
        consecutive: promises that k_pos counts up by one; keys outside the visible range are then not read.
        packed: `pack.pack(plans, H)`, if the caller keeps it.

    Returns:
        [B, H, Q, Dv] in v's dtype.
    """
    packed = packing.packed_once(plans, q.shape[1]) if packed is None else packed
    low, high = (None, None) if spans is None else (x.contiguous() for x in spans)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    mask = None if mask is None else rows_contiguous(mask)
    heads, queries, kinds = q.shape[1], q.shape[2], packed.kinds
    tables: tuple[Any, ...] = (
        packed.groups if packed.n_groups > 1 else None, packed.active, packed.tables, packed.key_slope,
        packed.key_weight, packed.hidden, packed.roll_start, scale, softcap or 0.0, packed.n_groups,
        list(packed.rolling), causal and mask is None, consecutive,
    )  # fmt: skip
    if queries * (heads // k.shape[1]) * kinds <= SPLIT_ROWS:
        acc, stat = grouped_split(q, k, v, mask, q_pos, k_pos, low, high, *tables)
        return finish(plans, packed, acc, stat, heads, q_pos, sinks, v.dtype)

    counted = any(plan.sink is not None and plan.statistics for plan in plans)
    direct = not counted and all(plan.rule is None for plan in plans)
    rule = _fused(plans, packed)
    inlined = rule if rule is not None and not counted and not rule[-1] else NO_RULE
    whole = direct or (inlined[1] != "" and packed.key_weight is None)
    per_row = 4 * q.shape[0] * heads * kinds * v.shape[3]
    chunk = queries if whole else max(128, WORKSPACE // per_row // 128 * 128)
    parts = []
    for at in range(0, queries, chunk):
        rows = slice(at, at + chunk)
        part_mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        part_low, part_high = (None if x is None else x[:, rows].contiguous() for x in (low, high))
        part = (q[:, :, rows], k, v, part_mask, q_pos[rows], k_pos, part_low, part_high)
        acc, stat, out = grouped_tiles(*part, *tables, packed.signed, packed.head_scale, sinks, direct, *inlined[:-1])
        if acc.numel():
            out = finish(plans, packed, acc, stat, heads, q_pos[rows], sinks, v.dtype, direct)
        parts.append(out)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _fused(plans: Sequence[Plan], packed: Packed) -> tuple[Any, ...] | None:
    """Arguments, name, plan, radix and size of the only rule and whether it pools heads; None if it has no fused form.

    `NO_RULE` if no plan has a rule.
    """
    ruled = [digit for digit in packed.digits if plans[digit.index].rule is not None]
    if not ruled:
        return NO_RULE
    fused = fused_form(plans[ruled[0].index].rule) if len(ruled) == 1 else None
    if fused is None:
        return None
    return fused.arguments, fused.name, ruled[0].index, ruled[0].radix, ruled[0].size, fused.pools_heads


def finish(
    plans: Sequence[Plan],
    packed: Packed,
    acc: Tensor,
    stat: Tensor,
    heads: int,
    q_pos: Tensor,
    sinks: Tensor | None,
    dtype: torch.dtype,
    together: bool = False,
) -> Tensor:
    """Output [B, H, Q, Dv] of partial results; the plans' sinks receive their statistics.

    `together`: the parts are of all groups at once, which plans without rule and statistics allow.
    """
    weighted = packed.key_weight is not None and not together
    n_groups = 1 if together else packed.n_groups
    rule = _fused(plans, packed)
    factors = None
    if rule is None:
        masses, lse = grouped_masses(stat, sinks, q_pos, heads, n_groups, weighted)
        _report(plans, packed, masses, lse)
        factors = _factors(plans, packed, masses, q_pos)
    counted = rule is not None and any(plan.sink is not None and plan.statistics for plan in plans)
    how = (sinks, packed.head_scale, packed.active, q_pos, *(rule or NO_RULE), n_groups, weighted, dtype, counted)
    out: Tensor
    out, masses, lse = grouped_merge(acc, stat, factors, *how)
    if counted:
        _report(plans, packed, masses, lse)
    return out


def _report(plans: Sequence[Plan], packed: Packed, masses: Tensor, lse: Tensor) -> None:
    digits = {digit.index: digit for digit in packed.digits}
    for i, plan in enumerate(plans):
        if plan.sink is not None and "lse" in plan.statistics:
            plan.sink("lse", lse)
        if plan.sink is not None and "mass" in plan.statistics:
            plan.sink("mass", packing.marginal(masses, digits[i], packed.n_groups, False))


def _factors(plans: Sequence[Plan], packed: Packed, masses: Tensor, q_pos: Tensor) -> Tensor:
    """[B, H, Q, R] product of the plans' factors; the weighted kinds carry the weighted factor of their plan."""
    ruled = [digit for digit in packed.digits if plans[digit.index].rule is not None]
    plain = torch.ones_like(masses[..., : packed.n_groups])
    weighted = plain if any(plans[digit.index].key_weight is not None for digit in ruled) else plain * 0
    for digit in ruled:
        plan = plans[digit.index]
        assert plan.rule is not None
        asked = plan.rule(packing.marginal(masses, digit, packed.n_groups, plan.key_weight is not None))
        active = (q_pos[None, :] >= plan.active_from[:, None])[:, None, :, None]
        on_groups = torch.where(active, packing.spread(asked, digit, packed.n_groups), 1.0)
        plain = plain * on_groups
        on_weighted = on_groups if plan.key_weight is None else torch.where(active, asked[..., plan.n_groups :], 0.0)
        weighted = weighted * on_weighted
    return plain if packed.key_weight is None else torch.cat([plain, weighted], -1)
