"""FIA's vectors: token selection, one attention operation, a tiny Llama with the text-only contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import fia
from vlmfix.decoders.fia import FIA, select, upper_fence
from vlmfix.method import LayerContext
from vlmfix.plan import Plan

from .. import mutants
from ..cases import ATTENTION, close, same
from . import pai

MUTANTS = {
    **mutants.of_attention(FIA),
    "fence moved": lambda patch: patch.setattr(fia, "FENCE", 0.0),
    "smallest taken": lambda patch: patch.setattr(fia, "largest", _smallest(fia.largest)),
}
del MUTANTS["heads permuted"]  # the released code treats all heads alike


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    if case["level"] == "selection":
        _selection(case, arrays)
    elif case["level"] == "attention":
        pai.attention(case, arrays, _method(case, arrays))
    else:
        pai.model(case, arrays, _method(case, arrays))


def _selection(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    first, late = arrays["vit_cls_first"].sum(0), arrays["vit_cls_penult"].sum(0)
    share = case["local_token_ratio"]
    assert case["iqr_factor"] == fia.FENCE
    assert case["spatial_token_ratio"] == 0
    local, summary = select(first, late, share, truncated=True)
    same(_indices(local), sorted(arrays["top_tokens"].tolist()), "local tokens")
    same(_indices(summary), sorted(arrays["bottom_tokens"].tolist()), "summary tokens")
    local, summary = select(first, late, share)
    same(_indices(summary), sorted(arrays["outliers_by_fence"].tolist()), "tokens above the fence")
    same(bool((local & summary).any()), False, "overlap")
    close(upper_fence(late), arrays["q1_q3_upper"][2], ATTENTION, "fence")


def _method(case: dict[str, Any], arrays: dict[str, Tensor]) -> FIA:
    layers = tuple(range(case["start_layer"], case["end_layer"])) if "start_layer" in case else (0,)
    return _Chosen(
        alpha=case["alpha"],
        beta=case["beta"],
        prompt_row=case.get("prefill_last_row_modified", True),
        layers=layers,
        variant="reference",
    ).choosing(case["image_span"][0], arrays["top_tokens"], arrays["bottom_tokens"])


class _Chosen(FIA):
    """With the case's token sets instead of those of a vision tower, which a case of the language side lacks."""

    vision_layers = ()

    def choosing(self, start: int, local: Tensor, summary: Tensor) -> FIA:
        object.__setattr__(self, "_sets", (start + local, start + summary))
        return self

    def resolve(self, facts: Any) -> Any:
        return self

    def plan(self, context: LayerContext) -> Plan | None:
        groups = torch.zeros_like(context.layout.kinds)
        local, summary = self._sets  # type: ignore[attr-defined]
        groups[:, local], groups[:, summary] = fia.LOCAL, fia.SUMMARY
        context.notes["groups"] = groups
        return FIA.plan(self, context)


def _indices(chosen: Tensor) -> list[int]:
    return chosen.nonzero()[:, 0].tolist()


def _smallest(original: Any) -> Any:
    return lambda values, count: original(-values, count)
