"""Grouped attention, one score at a time: the words of `vlmfix.plan` and nothing clever."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.plan import Plan


def group_of(plan: Plan, b: int, query: int, key: int) -> int:
    roll = plan.rolling
    if roll is not None and roll.nearest <= query - key <= roll.farthest and key >= int(roll.start[b]):
        return roll.group
    return int(plan.groups[b, key]) if key < plan.groups.shape[1] else 0


def entry(table: Tensor, b: int, *index: int) -> float:
    """An entry of a table whose rows and heads may be one for all."""
    place = [min(i, n - 1) for i, n in zip((b, *index), table.shape, strict=True)]
    return float(table[tuple(place)])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    sees: Any,
    scale: float,
    q_pos: Sequence[int],
    k_pos: Sequence[int],
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, Dv] and weights [B, H, Q, K] in float64.

    Args:
        q: [B, H, Q, D].
        k: [B, Hkv, K, D].
        v: [B, Hkv, K, Dv].
        plans: in order.
        sees: (row, head, query index, key index) -> None where the key is masked, else what is added to the score.
        scale: factor on q.k.
        q_pos: slots of the queries.
        k_pos: slots of the keys.
        softcap: soft cap of the scores.
        sinks: [H] logits in the denominator.
    """
    batch, heads, queries, _ = q.shape
    shared = heads // k.shape[1]
    weights = torch.zeros(batch, heads, queries, k.shape[2], dtype=torch.float64)
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for i in range(queries):
            rows = [
                _probabilities(q, k, plans, sees, scale, q_pos, k_pos, softcap, sinks, b, h, i) for h in range(heads)
            ]
            acting = [plan for plan in plans if plan.rule is not None and q_pos[i] >= int(plan.active_from[b])]
            factors = [_factors(plan, rows, b, q_pos[i], k_pos) for plan in acting]
            rows = [[p * math.prod(f[h][j] for f in factors) for j, p in enumerate(row)] for h, row in enumerate(rows)]
            for h, row in enumerate(rows):
                weights[b, h, i] = torch.tensor(row, dtype=torch.float64)
                out[b, h, i] = weights[b, h, i] @ v[b, h // shared].double()
                for plan in plans:
                    if plan.head_scale is not None and q_pos[i] >= int(plan.active_from[b]):
                        out[b, h, i] *= entry(plan.head_scale, b, h)
    return out, weights


def _probabilities(q, k, plans, sees, scale, q_pos, k_pos, softcap, sinks, b, h, i) -> list[float]:
    scores: list[float | None] = []
    for j in range(k.shape[2]):
        z = float(q[b, h, i].double() @ k[b, h // (q.shape[1] // k.shape[1]), j].double()) * scale
        z = math.tanh(z / softcap) * softcap if softcap else z
        hidden = False
        for plan in plans:
            for part in plan.hidden:
                blind = q_pos[i] >= int(part.query_from[b])
                hidden |= blind and int(part.start[b]) <= k_pos[j] < int(part.end[b])
            if q_pos[i] < int(plan.active_from[b]):
                continue
            group = group_of(plan, b, q_pos[i], k_pos[j])
            if plan.slope_pos is not None:
                down = plan.slope_pos if plan.slope_neg is None else plan.slope_neg
                z *= entry(plan.slope_pos if z >= 0 else down, b, h, group)
            if plan.key_slope is not None and k_pos[j] < plan.key_slope.shape[2]:
                z *= entry(plan.key_slope, b, h, k_pos[j])
            if plan.bias is not None:
                z += entry(plan.bias, b, h, group)
        added = sees(b, h, i, j)
        scores.append(None if hidden or added is None else z + added)
    seen = [z for z in scores if z is not None and z > -math.inf]
    if sinks is not None:
        seen.append(float(sinks[h]))
    top = max(seen, default=0.0)
    total = sum(math.exp(z - top) for z in seen)
    return [0.0 if z is None or total == 0 else math.exp(z - top) / total for z in scores]


def masses(plan: Plan, rows: list[list[float]], b: int, query: int, k_pos: Sequence[int]) -> list[list[float]]:
    """Mass of every group and of the weighted keys, per head."""
    out = []
    for row in rows:
        sums = [0.0] * (plan.n_groups + (plan.key_weight is not None))
        for p, key in zip(row, k_pos, strict=True):
            sums[group_of(plan, b, query, key)] += p
            if plan.key_weight is not None and key < plan.key_weight.shape[1]:
                sums[-1] += p * float(plan.key_weight[b, key])
        out.append(sums)
    return out


def _factors(plan: Plan, rows: list[list[float]], b: int, query: int, k_pos: Sequence[int]) -> list[list[float]]:
    """Per head and key the factor of its group, and of its weight."""
    assert plan.rule is not None
    mass = torch.tensor(masses(plan, rows, b, query, k_pos), dtype=torch.float64)[None, :, None]
    out = []
    for factor in plan.rule(mass)[0, :, 0].tolist():
        row = [factor[group_of(plan, b, query, key)] for key in k_pos]
        if plan.key_weight is not None:
            inside = plan.key_weight.shape[1]
            row = [
                f + factor[-1] * float(plan.key_weight[b, key]) if key < inside else f
                for f, key in zip(row, k_pos, strict=True)
            ]
        out.append(row)
    return out
