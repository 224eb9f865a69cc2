"""Grouped attention in plain PyTorch: the definition that every other form must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.plan import Plan


def grouped_attention(
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
) -> Tensor:
    """Attention as changed by plans (see `vlmfix.plan` for the mathematics).

    Args:
        q: [B, H, Q, D] queries.
        k: [B, Hkv, K, D] keys, not repeated; head h reads key/value head h // (H / Hkv).
        v: [B, Hkv, K, Dv] values.
        plans: in the order of the recipe; their row dimension is B.
        mask: [B or 1, 1 or H, Q, K] bool (True attends) or additive float; None means causal by position.
        scale: factor on q.k.
        q_pos: [Q] sequence slots of the queries.
        k_pos: [K] sequence slots of the keys.
        softcap: c of z <- c * tanh(z / c), before everything else.
        sinks: [H] logits that join the softmax's denominator.
        causal: whether an absent mask means causal (else everything is visible).

    Returns:
        [B, H, Q, Dv] in v's dtype; zeros on rows that see no key.
    """
    batch, heads, queries, _ = q.shape
    z = _scores(q, k, scale, softcap)
    views = [_View.of(plan, q_pos, k_pos) for plan in plans]
    for view in views:
        z = view.scores(z)
    z = _masked(z, mask, views, q_pos, k_pos, causal)

    p, lse = _softmax(z, sinks)
    factors = [view.factors(p, lse) for view in views]
    for factor in factors:
        if factor is not None:
            p = p * factor
    weights = p.unflatten(1, (k.shape[1], -1))
    out = torch.einsum("bgrqk,bgkd->bgrqd", weights, v.to(p.dtype)).reshape(batch, heads, queries, -1)
    for view in views:
        out = view.scaled(out)
    return out.to(v.dtype)


def probabilities(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    q_pos: Tensor,
    k_pos: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    plans: Sequence[Plan] = (),
) -> Tensor:
    """Attention of a few queries, as plans change its scores: [B, H, Q, K] float32.

    Arguments as in `grouped_attention`; factors and head scales are left out. Without plans `q_pos` may also be [B, Q],
    where every sample has queries of its own.
    """
    z, views = _scores(q, k, scale, softcap), [_View.of(plan, q_pos, k_pos) for plan in plans]
    for view in views:
        z = view.scores(z)
    return _softmax(_masked(z, mask, views, q_pos, k_pos, causal), sinks)[0]


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shared = q.to(dtype).unflatten(1, (k.shape[1], -1))
    z = torch.einsum("bgrqd,bgkd->bgrqk", shared, k.to(dtype)).flatten(1, 2) * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def _masked(z: Tensor, mask: Tensor | None, views: list[_View], q_pos: Tensor, k_pos: Tensor, causal: bool) -> Tensor:
    if mask is None:
        if causal:
            later = k_pos > q_pos[..., None]
            z = z.masked_fill(later if q_pos.dim() == 1 else later[:, None], float("-inf"))
    elif mask.dtype == torch.bool:
        z = z.masked_fill(~mask, float("-inf"))
    else:
        floor = torch.finfo(mask.dtype).min
        z = torch.where(mask <= floor, float("-inf"), z + mask)
    for view in views:
        z = view.hide(z)
    return z


def _softmax(z: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities [B, H, Q, K] (zeros on rows without a key) and log-sum-exp [B, H, Q]."""
    lse = torch.logsumexp(z, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(z.dtype)[None, :, None])
    finite = torch.where(lse.isinf(), 0.0, lse)
    return torch.exp(z - finite[..., None]), lse


@dataclass(frozen=True)
class _View:
    """A plan seen from one block of queries and keys."""

    plan: Plan
    groups: Tensor  # [B, 1 or Q, K] int64
    active: Tensor  # [B, 1, Q, 1] bool
    q_pos: Tensor
    k_pos: Tensor

    @staticmethod
    def of(plan: Plan, q_pos: Tensor, k_pos: Tensor) -> _View:
        groups = _at(plan.groups, k_pos, 0).long()[:, None, :]
        if plan.rolling is not None:
            roll = plan.rolling
            distance = q_pos[:, None] - k_pos[None, :]
            inside = (distance >= roll.nearest) & (distance <= roll.farthest) & (k_pos >= roll.start[:, None, None])
            groups = torch.where(inside, roll.group, groups)
        active = (q_pos[None, :] >= plan.active_from[:, None])[:, None, :, None]
        return _View(plan, groups, active, q_pos, k_pos)

    def scores(self, z: Tensor) -> Tensor:
        plan, new = self.plan, z
        if plan.slope_pos is not None:
            up = self._per_key(plan.slope_pos)
            down = up if plan.slope_neg is None else self._per_key(plan.slope_neg)
            new = new * torch.where(z >= 0, up, down)
        if plan.key_slope is not None:
            new = new * _at(plan.key_slope, self.k_pos, 1).to(z.dtype)[:, :, None, :]
        if plan.bias is not None:
            new = new + self._per_key(plan.bias)
        return z if new is z else torch.where(self.active, new, z)

    def hide(self, z: Tensor) -> Tensor:
        for part in self.plan.hidden:
            key = (self.k_pos >= part.start[:, None]) & (self.k_pos < part.end[:, None])
            blind = self.q_pos >= part.query_from[:, None]
            z = z.masked_fill((blind[:, :, None] & key[:, None, :])[:, None], float("-inf"))
        return z

    def factors(self, p: Tensor, lse: Tensor) -> Tensor | None:
        """[B, H, Q, K] factor on the probabilities; hands the wanted statistics to the plan's sink."""
        plan = self.plan
        if plan.sink is not None and "lse" in plan.statistics:
            plan.sink("lse", lse)
        if plan.rule is None and "mass" not in plan.statistics:
            return None
        names = torch.arange(plan.n_groups, device=p.device)
        member = (self.groups[..., None] == names).to(p.dtype)  # [B, 1 or Q, K, G]
        if plan.key_weight is not None:
            weight = _at(plan.key_weight, self.k_pos, 0).to(p.dtype)[:, None, :, None]
            member = torch.cat([member, weight.expand(*member.shape[:3], 1)], -1)
        masses = torch.einsum("bhqk,bqkg->bhqg", p, member.expand(-1, p.shape[2], -1, -1))
        if plan.sink is not None and "mass" in plan.statistics:
            plan.sink("mass", masses[..., : plan.n_groups])
        if plan.rule is None:
            return None
        factor = torch.einsum("bhqg,bqkg->bhqk", plan.rule(masses), member.expand(-1, p.shape[2], -1, -1))
        return torch.where(self.active, factor, 1.0)

    def scaled(self, out: Tensor) -> Tensor:
        if self.plan.head_scale is None:
            return out
        return torch.where(self.active, out * self.plan.head_scale.to(out.dtype)[:, :, None, None], out)

    def _per_key(self, table: Tensor) -> Tensor:
        """[B or 1, H or 1, G] -> [B, H or 1, 1 or Q, K]."""
        batch, queries, keys = self.groups.shape
        heads = table.shape[1]
        flat = self.groups.reshape(batch, 1, -1).expand(batch, heads, -1)
        return table.expand(batch, heads, -1).gather(2, flat).view(batch, heads, queries, keys)


def _at(table: Tensor, k_pos: Tensor, fill: float) -> Tensor:
    """Columns `k_pos` of a [..., K0] table, `fill` past its end."""
    padded = torch.nn.functional.pad(table, (0, 1), value=fill)
    return padded[..., k_pos.clamp(max=table.shape[-1])]
