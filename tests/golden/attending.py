"""One attention operation of a case, with and without a method's plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.layout import Layout
from vlmfix.method import AttentionMethod, LayerContext, ModelFacts
from vlmfix.plan import Plan

from .cases import ATTENTION, close


def facts(heads: int, depth: int = 1) -> ModelFacts:
    """A model of which only the heads matter."""
    return ModelFacts("llama", depth, dict.fromkeys(range(depth), heads), 1)


def spanned(rows: int, length: int, start: int, end: int, pads: list[int] | None = None) -> Layout:
    """A layout with one picture at [start, end) in every row."""
    visual, valid = torch.zeros(rows, length, dtype=torch.bool), torch.ones(rows, length, dtype=torch.bool)
    visual[:, start:end] = True
    for row, pad in enumerate(pads or []):
        valid[row, :pad] = False
    return Layout.of(visual, valid)


def plan_of(method: AttentionMethod, layout: Layout, heads: int) -> Plan | None:
    """What a method asks of layer 0."""
    return method.plan(LayerContext(0, layout, heads, None, 0, {}, {}, facts(heads)))


def attend(arrays: dict[str, Tensor], plans: list[Plan], value: Tensor | None = None) -> Tensor:
    """[B, H, Q, Dv] output of the case's q, k, v (or another value) under plans."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"] if value is None else value
    queries, keys = q.shape[2], k.shape[2]
    slots = torch.arange(keys)
    scale = q.shape[-1] ** -0.5
    return grouped_attention(q, k, v, plans, arrays.get("mask"), scale, slots[keys - queries :], slots)


def weights(arrays: dict[str, Tensor], plans: list[Plan]) -> Tensor:
    """[B, H, Q, K] what the output gives to each value."""
    k = arrays["k"]
    eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    return attend(arrays, plans, eye)


def same_as_stored(arrays: dict[str, Tensor], plan: Plan | None, ignored: dict[str, Any] | None = None) -> None:
    """Weights and outputs with and without the plan equal `attn_out`, `out`, `attn_in` and `out_plain`."""
    plans = [] if plan is None else [plan]
    keep = torch.ones(*arrays["q"].shape[:3:2], dtype=torch.bool)
    for row, queries in (ignored or {}).items():
        keep[int(row), queries] = False
    chosen = {"attn_in": weights(arrays, []), "attn_out": weights(arrays, plans)}
    chosen |= {"out_plain": attend(arrays, []), "out": attend(arrays, plans)}
    for name, actual in chosen.items():
        if name in arrays:
            actual, expected = actual.transpose(1, 2)[keep], arrays[name].transpose(1, 2)[keep]
            close(actual, expected, ATTENTION, name, rtol=1e-5)
