"""Deliberate mistakes: vectors that do not notice them would prove nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from vlmfix.method import Step
from vlmfix.plan import Plan

Mutant = Callable[[pytest.MonkeyPatch], None]


def of_attention(cls: type[Any]) -> dict[str, Mutant]:
    """Mistakes in the plans of an attention method."""
    return {
        "sign flipped": lambda patch: _plans(patch, cls, _flipped),
        "span moved": lambda patch: _plans(patch, cls, _moved),
        "heads permuted": lambda patch: _plans(patch, cls, _permuted),
        "starts one row late": lambda patch: _plans(patch, cls, lambda p: replace(p, active_from=p.active_from + 1)),
        "layer shifted": lambda patch: _layers(patch, cls),
    }


def of_decoding(cls: type[Any], dropping: Iterable[str] = ()) -> dict[str, Mutant]:
    """Mistakes in the scores of a decoding method, without those that a method cannot notice."""
    mutants: dict[str, Mutant] = {
        "branches swapped": lambda patch: _scores(patch, cls, lambda z, s: (s.branches[0], _against(s, z))),
        "contrast dropped": lambda patch: _scores(patch, cls, lambda z, s: (z, _against(s, z))),
        "step shifted": lambda patch: _scores(patch, cls, lambda z, s: (z, replace(s, number=s.number + 1))),
    }
    return {name: mutant for name, mutant in mutants.items() if name not in set(dropping)}


def _plans(patch: pytest.MonkeyPatch, cls: type[Any], change: Callable[[Plan], Plan]) -> None:
    original = cls.plan

    def plan(self: Any, context: Any) -> Plan | None:
        made = original(self, context)
        return None if made is None else change(made)

    patch.setattr(cls, "plan", plan)


def _layers(patch: pytest.MonkeyPatch, cls: type[Any]) -> None:
    original = cls.acts_on
    patch.setattr(cls, "acts_on", lambda self, depth: tuple((x - 1) % depth for x in original(self, depth)))


def _scores(patch: pytest.MonkeyPatch, cls: type[Any], change: Callable[[Tensor, Step], tuple[Tensor, Step]]) -> None:
    original = cls.scores
    patch.setattr(cls, "scores", lambda self, logits, step: original(self, *change(logits, step)))


def _against(step: Step, branch: Tensor) -> Step:
    """The step with another first branch."""
    return replace(step, branches=(branch, *step.branches[1:]))


def _flipped(plan: Plan) -> Plan:
    """What was raised is lowered."""
    rule = plan.rule
    return replace(
        plan,
        rule=None if rule is None else lambda masses: 2 - rule(masses),
        bias=None if plan.bias is None else -plan.bias,
        **{name: None if (x := getattr(plan, name)) is None else 2 - x for name in ("slope_pos", "slope_neg")},
        **{name: None if (x := getattr(plan, name)) is None else 2 - x for name in ("key_slope", "head_scale")},
    )


def _moved(plan: Plan) -> Plan:
    """Every key plays the part of its left neighbour."""
    names = ("key_slope", "key_weight")
    rolled = {name: None if (x := getattr(plan, name)) is None else x.roll(1, -1) for name in names}
    return replace(plan, groups=plan.groups.roll(1, 1), **rolled)


def _permuted(plan: Plan) -> Plan:
    """Every head does what its neighbour should."""
    rule, head_rule = plan.rule, plan.head_rule
    names = ("slope_pos", "slope_neg", "bias", "key_slope", "head_scale")
    rolled = {name: None if (x := getattr(plan, name)) is None else x.roll(1, 1) for name in names}
    return replace(
        plan,
        rule=None if rule is None else lambda masses: rule(masses).roll(1, 1),
        head_rule=None if head_rule is None else lambda *out: head_rule(*out).roll(1, 1),
        **rolled,
    )
