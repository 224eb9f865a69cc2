"""Plans that exercise every field, for the tests of grouped attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.kernels.tools import Place
from vlmfix.kernels.rules import FusedRule
from vlmfix.plan import Hidden, Plan, Rolling


def make(name: str, place: Place, batch: int, heads: int, keys: int) -> list[Plan]:
    """The plans of that name; groups are a head, a contiguous middle and a tail, with scattered members of a fourth."""
    table = keys - min(3, keys - 1)  # the last keys were generated: group 0
    groups = torch.zeros(batch, table, dtype=torch.uint8, device=place.device)
    groups[:, table // 6 : table // 2] = 1
    groups[:, table // 2 : table // 2 + table // 4] = 2
    groups[:, :: max(2, table // 7)] = 3
    first = place.tensor([keys // 3 * (b % 2) for b in range(batch)])
    return PLANS[name](place, groups, first, heads)


def _slopes(place, groups, first, heads):
    batch, size = groups.shape[0], 4
    return [
        Plan(
            groups,
            size,
            first,
            slope_pos=place.rand(1, heads, size) + 0.5,
            slope_neg=place.rand(batch, 1, size) + 0.3,
            bias=place.rand(1, 1, size) - 0.5,
        )
    ]


def _nothing(place, groups, first, heads):
    return [Plan(groups, 4, first)]


def _rule(place, groups, first, heads):
    return [Plan(groups, 4, first, rule=lambda m: 0.5 + m)]


def _redistribute(place, groups, first, heads):
    arguments = place.tensor([[0.6, 0.15, 0.4, 9.0, 2.0]]).repeat(groups.shape[0], 1)
    return [Plan(groups, 4, first, rule=FusedRule("redistribute", arguments))]


def _gaze(place, groups, first, heads):
    arguments = place.tensor([[float(heads // 2), 9.0]]).repeat(groups.shape[0], 1)
    weight = torch.where(groups == 1, 1 + place.rand(*groups.shape), 0.0)
    return [Plan(groups.clamp(max=2), 3, first, key_weight=weight, rule=FusedRule("gaze", arguments))]


def _weights(place, groups, first, heads):
    weight = place.randn(*groups.shape)
    return [Plan(groups.clamp(max=2), 3, first, key_weight=weight, rule=lambda m: 1 + 0.3 * m)]


def _keys(place, groups, first, heads):
    slope = 0.5 + place.rand(groups.shape[0], heads, groups.shape[1])
    return [Plan(groups, 4, first, key_slope=slope, head_scale=0.5 + place.rand(1, heads))]


def _rolling(place, groups, first, heads):
    rolling = Rolling(1, 0, 4, start=first + 2)
    return [Plan(groups.clamp(max=1), 2, first, bias=place.tensor([[[0.0, 0.7]]]), rolling=rolling)]


def _rolling_rule(place, groups, first, heads):
    rolling = Rolling(2, 1, 5, start=first)
    return [Plan(groups.clamp(max=2), 3, first, rule=lambda m: 0.5 + m, rolling=rolling)]


def _hidden(place, groups, first, heads):
    part = Hidden(first + 1, first * 0 + 2, first * 0 + 9)
    return [Plan(groups, 4, first, hidden=(part,), rule=lambda m: 0.5 + m, head_scale=0.5 + place.rand(2, heads)[:1])]


def _two(place, groups, first, heads):
    two = groups.clamp(max=1)
    scored = Plan(two, 2, first + 3, slope_pos=0.5 + place.rand(1, heads, 2), head_scale=0.5 + place.rand(1, heads))
    return [
        scored,
        Plan(groups.clamp(max=2), 3, first, rule=lambda m: 0.5 + m),
        Plan(two, 2, first, rule=lambda m: 1 - m),
    ]


PLANS: dict[str, Callable[..., list[Plan]]] = {
    "nothing": _nothing,
    "slopes": _slopes,
    "rule": _rule,
    "redistribute": _redistribute,
    "gaze": _gaze,
    "weights": _weights,
    "keys": _keys,
    "rolling": _rolling,
    "rolling_rule": _rolling_rule,
    "hidden": _hidden,
    "two": _two,
}
