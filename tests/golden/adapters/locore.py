"""LocoRE's vectors: one decode step from the formulas, normalised or not, with either window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders.locore import LocoRE
from vlmfix.layout import Layout

from .. import mutants
from ..attending import attend, plan_of, weights
from ..cases import close

MUTANTS = {"window moved": lambda patch: _later(patch), **mutants.of_attention(LocoRE)}
for _alike in ("span moved", "heads permuted", "layer shifted", "starts one row late"):
    del MUTANTS[_alike]  # no table over keys, heads all alike, one layer and one row


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    rows, heads, _, _ = arrays["q"].shape
    assert hyper["query_position"] == arrays["k"].shape[2] - 1
    layout = Layout.of(torch.zeros(rows, hyper["first_generated_position"], dtype=torch.bool))
    close(weights(arrays, []), arrays["weights"], 1e-6, "plain weights")
    for window, own_key in (("literal_window", False), ("self_window", True)):
        for form, normalise in (("norm", True), ("raw", False)):
            method = LocoRE(hyper["beta"], hyper["window"], own_key, normalise)
            plan = plan_of(method, layout, heads)
            assert plan is not None
            name = f"{window}.{{}}_{form}"
            close(weights(arrays, [plan]), arrays[name.format("weights")], 1e-6, name.format("weights"))
            close(attend(arrays, [plan]), arrays[name.format("out")], 1e-6, name.format("out"), rtol=1e-6)


def _later(patch: Any) -> None:
    original = LocoRE.plan

    def plan(self: Any, context: Any) -> Any:
        from dataclasses import replace

        made = original(self, context)
        assert made is not None
        assert made.rolling is not None
        return replace(made, rolling=replace(made.rolling, start=made.rolling.start + 1))

    patch.setattr(LocoRE, "plan", plan)
