"""Vectors of the diagnostics: flow and gradients, sinks, text dominance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders.var import sink_score
from vlmfix.diagnostics import flow, measures

from ..cases import ATTENTION, close, same

MUTANTS = {
    "residual left out": lambda patch: patch.setattr(flow, "_with_residual", lambda weights: weights),
    "no half for negative gradients": lambda patch: patch.setattr(
        flow, "relevance", lambda a, g: _relevance(a, [x.abs() for x in g])
    ),
    "sinks over all tokens": lambda patch: patch.setattr(measures, "sink_ratio", lambda s, v, n: s),
    "token counts left out": lambda patch: patch.setattr(
        measures, "text_dominance", lambda t, v, n, m: _dominance(t, v, 1, 1)
    ),
}
_relevance, _dominance = flow.relevance, measures.text_dominance


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    kinds = {
        "flow_and_gradient": _flow,
        "secondary_sinks": _secondary,
        "visual_sinks": _visual_sinks,
        "text_dominance": _dominates,
    }
    kinds[case["kind"]](case, arrays)


def _flow(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    weights, slopes = arrays["attention"], arrays["attention_grad"]
    means, start = list(weights.mean(1)), case["rollout_start_layer"]
    for layer in range(case["L"]):
        close(flow.rollout(means[: layer + 1]), arrays["expected_rollout"][layer], ATTENTION, f"rollout to {layer}")
    close(flow.rollout(means, start), arrays["expected_rollout_from_start"], ATTENTION, "rollout from a layer")
    close(flow.rollout_row(means, 5, start), arrays["expected_rollout_from_start"][5], ATTENTION, "a row of rollout")
    close(flow.relevance(list(weights), list(slopes)), arrays["expected_relevance"], ATTENTION, "relevance", rtol=1e-5)
    close(flow.gradcam(weights[-1], slopes[-1]), arrays["expected_last_layer_gradcam"], ATTENTION, "gradcam")
    close(flow.saliency(weights, slopes), arrays["expected_saliency_layers"], ATTENTION, "saliency")
    text = torch.ones(case["T"], dtype=torch.bool)
    text[slice(*case["visual_span"])] = False
    shown = flow.saliency_display(weights, slopes, text)
    close(shown, arrays["expected_saliency_text_display"], ATTENTION, "saliency as drawn")


def _secondary(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    found, sinks = measures.secondary_sinks(arrays["hidden_states"], case["bos_position"], case["cosine_threshold"])
    same(found, arrays["expected_sink_map"].bool(), "sinks")
    names = {"bos_sink": "primary", "secondary": "secondary", "noise": "noise"}
    expected = {int(t): (names[label["type"]], tuple(label["layers"])) for t, label in case["labels"].items()}
    same({sink.token: (sink.kind, sink.layers) for sink in sinks}, expected, "labels")


def _visual_sinks(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    score = sink_score(arrays["hidden_states"], tuple(case["sink_dims"]))
    sinks = score > case["tau"]
    same(sinks[0].nonzero()[:, 0].tolist(), sorted(arrays["expected_sink_positions"].tolist()), "sinks")
    visual = torch.zeros_like(sinks)
    visual[:, slice(*case["visual_span"])] = True
    mass, on_sinks = (
        (arrays["attention"] * where[:, None, None].float()).sum(-1) for where in (visual, visual & sinks)
    )
    close(mass, arrays["expected_visual_mass"], ATTENTION, "visual mass")
    ratio = measures.sink_ratio(on_sinks, mass, int(visual.sum()))
    close(ratio, arrays["expected_visual_sink_ratio"], ATTENTION, "sink ratio")
    chosen = measures.image_centric(ratio, mass, case["rho"], case["mass_threshold"])
    same(chosen, arrays["expected_image_centric"].bool(), "image-centric rows")


def _dominates(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    rows = arrays["attention"][:, :, case["output_start"] :].mean((1, 2))
    visual = rows[:, slice(*case["visual_span"])].sum(-1)
    text = rows[:, : case["output_start"]].sum(-1) - visual
    found = measures.text_dominance(text, visual, case["n_text"], case["n_visual"])
    close(found.mdi, arrays["expected_mdi"], ATTENTION, "MDI", rtol=1e-5)
    close(found.aei_text, arrays["expected_aei_text"], ATTENTION, "AEI of text", rtol=1e-5)
    close(found.aei_visual, arrays["expected_aei_visual"], ATTENTION, "AEI of pictures", rtol=1e-5)
