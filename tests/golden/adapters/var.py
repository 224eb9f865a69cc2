"""VAR's vectors: one attention operation, or a tiny Llama's prefill and decode.

The released code counts p as the share that sinks keep and rho as the largest share of sinks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders.var import TEXT_SINK, VAR, VISUAL_SINK, sink_score
from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.method import LayerContext, ModelFacts
from vlmfix.plan import Plan

from .. import mutants
from ..cases import ATTENTION, MODEL, close, same
from ..machine import llama, spans, with_attention_method

MUTANTS = mutants.of_attention(VAR)


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    {"attention": _attention, "model": _model}[case["level"]](case, arrays)


def _method(case: dict[str, Any], layers: tuple[int, ...]) -> VAR:
    return VAR(
        move_fraction=1 - case["p"],
        keep_ratio=1 - case["rho"],
        min_mass=case["summ"],
        tau=case["tau"],
        sink_dims=tuple(case["sink_dims"]),
        layers=layers,
        variant="reference",
    )


def _attention(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    q, k, v, hidden = (arrays[name] for name in ("q", "k", "v", "hidden_states"))
    rows, heads, queries, size = q.shape
    keys = k.shape[2]
    layout = spans(case, rows, hidden.shape[1])
    facts = ModelFacts("llama", 1, {0: heads}, hidden.shape[2])
    method = _method(case, (0,)).resolve(facts)
    assert isinstance(method, VAR)
    assert method.sink_dims is not None
    close(sink_score(hidden, method.sink_dims), arrays["phi"], ATTENTION, "phi", rtol=1e-5)
    plan = method.plan(LayerContext(0, layout, heads, hidden, 0, {}, {}, facts))
    _same_sinks(plan, case, arrays, layout.visual)
    mask = arrays["mask"]
    mask = mask if mask.dim() == 4 else mask.view(-1, 1, *mask.shape[-2:])
    slots = torch.arange(keys)
    eye = torch.eye(keys).expand(rows, k.shape[1], keys, keys)

    def attend(value: Tensor, plans: list[Plan]) -> Tensor:
        return grouped_attention(q, k, value, plans, mask, size**-0.5, slots[keys - queries :], slots)

    plans = [] if plan is None else [plan]
    plain, weights = attend(eye, []), attend(eye, plans)
    close(plain, arrays["attn_in"], ATTENTION, "plain weights")
    close(weights, arrays["attn_out"], ATTENTION, "weights")
    close(attend(v, []), arrays["out_plain"], ATTENTION, "plain output", rtol=1e-5)
    close(attend(v, plans), arrays["out"], ATTENTION, "output", rtol=1e-5)
    changed = (weights - plain).abs().amax(-1) > 1e-6
    assert not (changed & ~arrays["selected"].bool()).any(), "rows changed that the reference leaves alone"


def _same_sinks(plan: Plan | None, case: dict[str, Any], arrays: dict[str, Tensor], visual: Tensor) -> None:
    expected = [item["sink_positions"] for item in case.get("items", ())] or [arrays["sink_positions"].tolist()]
    for row, wanted in enumerate(expected):
        if plan is None:
            assert not any(visual[row, t] for t in wanted), "visual sinks, but nothing planned"
            continue
        sink = (plan.groups[row] == VISUAL_SINK) | (plan.groups[row] == TEXT_SINK)
        same(sink.nonzero()[:, 0].tolist(), sorted(wanted), f"sinks of row {row}")


def _model(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    weights = {name[2:]: value for name, value in arrays.items() if name.startswith("w.")}
    depth = case["config"]["num_hidden_layers"]
    last = depth if case["last_layer_included"] else depth - 1
    method = _method(case, tuple(range(case["first_layer"], last)))
    embeds, steps = arrays["inputs_embeds"], case["decode_steps"]
    layout = spans(case, *embeds.shape[:2])
    result = with_attention_method(llama(case["config"], weights), method, embeds, layout, steps)
    same(result.tokens, arrays["tokens"], "tokens")
    close(result.prefill, arrays["logits_prefill"], MODEL, "prefill logits")
    close(torch.stack(result.steps[1:], 1), arrays["logits_decode"], MODEL, "decode logits")
    for (context, *_), plan in result.calls:
        wanted = case["sink_positions_per_layer"][str(context.layer)]
        _same_sinks(plan, {"items": [{"sink_positions": wanted}]}, arrays, layout.visual)
    acted = {context.layer for (context, *_), _ in result.calls}
    same(acted, {int(layer) for layer, sinks in case["sink_positions_per_layer"].items() if sinks}, "layers")
    plain = with_attention_method(llama(case["config"], weights), VAR(move_fraction=0), embeds, layout, steps)
    close(plain.prefill, arrays["logits_prefill_plain"], MODEL, "plain prefill logits")
    close(torch.stack(plain.steps[1:], 1), arrays["logits_decode_plain"], MODEL, "plain decode logits")
