"""Plans as the tensors that the Triton kernels read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.plan import Plan

MOST_GROUPS = 16
"""Largest number of joint groups of all plans together that the kernels take."""


@dataclass(frozen=True)
class Digit:
    """Where a plan's group id sits in the joint id: (joint // radix) % size.

    Args:
        index: place of the plan among the plans.
        radix: product of the sizes before it.
        size: the plan's number of groups.
    """

    index: int
    radix: int
    size: int


@dataclass(frozen=True)
class Packed:
    """Plans of one layer as tensors. P plans, G joint groups.

    Args:
        groups: [B, K0] uint8 joint group of each prompt key; None if all keys are alike.
        n_groups: G.
        digits: for each plan with groups, where its ids sit in the joint id.
        active: [P, B] int64 first active position.
        tables: [P, 3, B, H, G] float32 slope for z >= 0, slope for z < 0, bias; None if no plan has any.
        key_slope: [P, B, 1 or H, K0] float32, None if no plan has any.
        key_weight: [B, K0] float32 of the one plan that has weights.
        hidden: [N, 3, B] int64 first blind query, first hidden key, end of the hidden keys.
        rolling: radix, size, group, nearest, farthest of the one rolling group.
        roll_start: [B] int64 first position of the rolling group.
        head_scale: [P, B, H] float32, None if no plan has any.
        signed: whether some slope depends on the sign of the score.
    """

    groups: Tensor | None
    n_groups: int
    digits: tuple[Digit, ...]
    active: Tensor
    tables: Tensor | None
    key_slope: Tensor | None
    key_weight: Tensor | None
    hidden: Tensor | None
    rolling: tuple[int, int, int, int, int]
    roll_start: Tensor | None
    head_scale: Tensor | None
    signed: bool = True

    @property
    def kinds(self) -> int:
        """R, partial results per query row: one per joint group, twice that with key weights."""
        return self.n_groups * (1 if self.key_weight is None else 2)

    @property
    def tensors(self) -> list[Tensor | None]:
        """The tensors, in the order of the fields."""
        return [
            self.groups,
            self.active,
            self.tables,
            self.key_slope,
            self.key_weight,
            self.hidden,
            self.roll_start,
            self.head_scale,
        ]

    def copy_(self, other: Packed) -> None:
        """Takes over another pack's values in place, for graphs captured over these addresses.

        Raises:
            ValueError: the other pack differs in more than values.
        """
        if (self.rolling, self.n_groups, self.signed) != (other.rolling, other.n_groups, other.signed):
            raise ValueError("packs of different structure: capture a new graph")
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            if (mine is None) != (theirs is None) or (
                mine is not None and theirs is not None and mine.shape != theirs.shape
            ):
                raise ValueError("packs of different structure: capture a new graph")
            if mine is not None and theirs is not None:
                mine.copy_(theirs)


def unsupported(plans: Sequence[Plan]) -> str | None:
    """Why the kernels cannot evaluate these plans together; None if they can."""
    if sum(plan.key_weight is not None for plan in plans) > 1:
        return "more than one plan with key weights"
    if sum(plan.rolling is not None for plan in plans) > 1:
        return "more than one rolling group"
    if _joint(plans)[1] > MOST_GROUPS:
        return f"more than {MOST_GROUPS} joint groups"
    return None


def pack(plans: Sequence[Plan], heads: int) -> Packed:
    """Packs plans that `unsupported` has passed.

    Args:
        plans: at least one, in the order of the recipe.
        heads: H.
    """
    digits, n_groups = _joint(plans)
    batch, device = plans[0].active_from.shape[0], plans[0].active_from.device
    groups = None
    for digit in digits:
        own = plans[digit.index].groups
        part = own if digit.radix == 1 else own * digit.radix
        groups = part if groups is None else groups + part
    hidden = [torch.stack((x.query_from, x.start, x.end)) for plan in plans for x in plan.hidden]
    weights = [plan.key_weight for plan in plans if plan.key_weight is not None]
    roll_digit = next((d for d in digits if plans[d.index].rolling is not None), None)
    roll = plans[roll_digit.index].rolling if roll_digit else None
    return Packed(
        groups=None if groups is None else groups.to(torch.uint8).contiguous(),
        n_groups=n_groups,
        digits=digits,
        active=torch.stack([plan.active_from for plan in plans]).long(),
        tables=_tables(plans, digits, n_groups, heads),
        key_slope=_stacked([plan.key_slope for plan in plans], 1.0),
        key_weight=weights[0].float().contiguous() if weights else None,
        hidden=torch.stack(hidden).long() if hidden else None,
        rolling=(roll_digit.radix, roll_digit.size, roll.group, roll.nearest, roll.farthest)
        if roll and roll_digit
        else (1, 1, 0, 0, 0),
        roll_start=roll.start.long() if roll else None,
        head_scale=_head_scales(plans, batch, heads, device),
        signed=any(plan.slope_neg is not None for plan in plans),
    )


_packs: dict[tuple[int, ...], Packed] = {}


def packed_once(plans: Sequence[Plan], heads: int) -> Packed:
    """`pack`, remembered as long as the plans live; their tensors must not change in place meanwhile."""
    key = (heads, *map(id, plans))
    if key not in _packs:
        _packs[key] = pack(plans, heads)
        for plan in plans:
            weakref.finalize(plan, _packs.pop, key, None)
    return _packs[key]


def renew(plans: Sequence[Plan], heads: int) -> None:
    """Brings a remembered pack up to date with its plans, whose tensors changed in place."""
    known = _packs.get((heads, *map(id, plans)))
    if known is not None:
        known.copy_(pack(plans, heads))


def marginal(masses: Tensor, digit: Digit, n_groups: int, weighted: bool) -> Tensor:
    """A plan's masses [B, H, Q, G], or G + 1 if it has weights, out of the joint ones [B, H, Q, R]."""
    plain: Tensor = masses[..., :n_groups].unflatten(-1, (-1, digit.size, digit.radix)).sum((-3, -1))
    if not weighted:
        return plain
    return torch.cat([plain, masses[..., n_groups:].sum(-1, keepdim=True)], -1)


def spread(factors: Tensor, digit: Digit, n_groups: int) -> Tensor:
    """A plan's factors [B, H, Q, G] on its groups as factors on the joint groups [B, H, Q, n_groups]."""
    index = torch.arange(n_groups, device=factors.device) // digit.radix % digit.size
    return factors[..., index]


def _joint(plans: Sequence[Plan]) -> tuple[tuple[Digit, ...], int]:
    digits, radix = [], 1
    for i, plan in enumerate(plans):
        scored = plan.slope_pos is not None or plan.bias is not None
        if scored or plan.rule is not None or "mass" in plan.statistics or plan.key_weight is not None:
            digits.append(Digit(i, radix, plan.n_groups))
            radix *= plan.n_groups
    return tuple(digits), radix


def _tables(plans: Sequence[Plan], digits: Sequence[Digit], n_groups: int, heads: int) -> Tensor | None:
    if all(plan.slope_pos is None and plan.bias is None for plan in plans):
        return None
    batch, device = plans[0].active_from.shape[0], plans[0].active_from.device
    tables = torch.ones(len(plans), 3, batch, heads, n_groups, device=device)
    tables[:, 2] = 0
    for digit in digits:
        plan, table = plans[digit.index], tables[digit.index]
        if plan.slope_pos is not None:
            table[0] = _expanded(plan.slope_pos, digit, n_groups)
            table[1] = table[0] if plan.slope_neg is None else _expanded(plan.slope_neg, digit, n_groups)
        if plan.bias is not None:
            table[2] = _expanded(plan.bias, digit, n_groups)
    return tables


def _expanded(table: Tensor, digit: Digit, n_groups: int) -> Tensor:
    index = torch.arange(n_groups, device=table.device) // digit.radix % digit.size
    return table[..., index].float()


def _stacked(slopes: Sequence[Tensor | None], fill: float) -> Tensor | None:
    given = [x for x in slopes if x is not None]
    if not given:
        return None
    shape = torch.broadcast_shapes(*(x.shape for x in given))
    return torch.stack(
        [given[0].new_full(shape, fill).float() if x is None else x.float().expand(shape) for x in slopes]
    )


def _head_scales(plans: Sequence[Plan], batch: int, heads: int, device: torch.device) -> Tensor | None:
    if all(plan.head_scale is None for plan in plans):
        return None
    ones = torch.ones(batch, heads, device=device)
    return torch.stack([ones if p.head_scale is None else p.head_scale.float().expand(batch, heads) for p in plans])
