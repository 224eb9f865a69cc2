"""GIFT's vectors: one enhanced attention operation, the map from a prefill's attention, a tiny Llama's decoding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import gift
from vlmfix.decoders.gift import GIFT, normalised, rise
from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.method import LayerContext

from .. import mutants
from ..attending import facts, spanned
from ..cases import ATTENTION, close, same
from ..machine import llama, with_attention_method

MUTANTS = {
    **mutants.of_attention(GIFT),
    "falls counted": lambda patch: patch.setattr(gift, "rise", lambda rows, n: rise(-rows, n)),
    "words shifted": lambda patch: patch.setattr(gift, "rise", lambda rows, n: rise(rows, n.roll(1, -1))),
}
LOGITS = 1e-4


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    kinds = {"attention_enhancement": _attention, "saliency_map": _map, "tiny_model_end_to_end": _model}
    kinds[case["kind"]](case, arrays)


def _attention(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    rows, heads, queries, keys = case["B"], case["H"], case["Q"], case["K"]
    layout = spanned(rows, keys, *case["visual_span"])
    weight = torch.zeros(rows, keys)
    weight[:, slice(*case["visual_span"])] = arrays["saliency"]
    asked = torch.zeros_like(layout.visual)
    asked[:, slice(*case["query_span"])] = True
    notes = {"weight": weight, "asked": asked, "lengths": asked.sum(1)}
    plan = GIFT(alpha=case["alpha"]).plan(LayerContext(0, layout, heads, None, keys - queries, {}, notes, facts(heads)))
    assert plan is not None
    q, k = arrays["q"], arrays["k"]
    slots = torch.arange(keys)
    eye = torch.eye(keys).expand(rows, k.shape[1], keys, keys)

    def attend(value: Tensor, plans: list[Any]) -> Tensor:
        mask = arrays["attention_mask"].expand(rows, -1, -1, -1)
        return grouped_attention(q, k, value, plans, mask, case["scaling"], slots[keys - queries :], slots)

    close(attend(eye, []), arrays["plain_weights"], ATTENTION, "plain weights")
    close(attend(arrays["v"], []).transpose(1, 2), arrays["plain_output"], ATTENTION, "plain output", rtol=1e-5)
    weights, output = attend(eye, [plan]), attend(arrays["v"], [plan]).transpose(1, 2)
    close(weights[:1], arrays["expected_weights"][:1], ATTENTION, "weights")
    close(output[:1], arrays["expected_output"][:1], ATTENTION, "output", rtol=1e-5)
    for row in range(1, rows):  # the released code leaves all samples but the first alone; here each is on its own
        alone = {name: arrays[name][row : row + 1] for name in ("q", "k", "v")}
        single = GIFT(alpha=case["alpha"]).plan(
            LayerContext(0, spanned(1, keys, *case["visual_span"]), heads, None, keys - queries, {},
                         {name: note[row : row + 1] for name, note in notes.items()}, facts(heads))
        )  # fmt: skip
        assert single is not None
        out = grouped_attention(
            alone["q"], alone["k"], alone["v"], [single], None, case["scaling"], slots[keys - queries :], slots
        )
        close(output[row : row + 1], out.transpose(1, 2), ATTENTION, f"output of sample {row}", rtol=1e-5)


def _map(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    (start, end), visual = case["query_span"], slice(*case["visual_span"])
    counts = torch.zeros(end - start)
    for offset in case["content_token_offsets"]:
        counts[offset] += 1
    layers = arrays["attentions"][:, :, start - 1 : end, visual]
    shift = torch.stack([gift.gaze_shift(gift.rise(rows, counts), counts.sum()) for rows in layers]).mean(0)
    close(shift, arrays["selected_shifts"].mean((0, 1, 2)), ATTENTION, "mean shift")
    close((case["alpha"] * normalised(shift)).exp(), arrays["expected_saliency"], ATTENTION, "map", rtol=1e-5)


def _model(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    weights = {name: value for name, value in arrays.items() if not name.startswith("io.")}
    tiny, embeds = llama(case["config"], weights), arrays["io.inputs_embeds"]
    layout = spanned(1, embeds.shape[1], *case["visual_span"])
    settings = {"alpha": case["alpha"], "saliency_layers": tuple(case["saliency_layers"])}
    method = _Asked(**settings, layers=tuple(case["enhancement_layers"]))
    found: dict[str, Tensor] = {}
    method.about(case["query_span"], case["content_token_offsets"], found)
    for prefix, chosen in (("expected", method), ("plain", GIFT(alpha=0))):
        run = with_attention_method(tiny, chosen, embeds, layout, case["steps"] - 1)
        same(torch.stack(run.steps).argmax(-1)[:, 0], arrays[f"io.{prefix}_tokens"], f"{prefix} tokens")
        close(torch.cat(run.steps), arrays[f"io.{prefix}_logits"], LOGITS, f"{prefix} logits")
    close(found["weight"][0, layout.visual[0]], arrays["io.saliency"], LOGITS, "map", rtol=1e-4)
    assert method.splits_prefill(4) == (max(case["saliency_layers"]) > min(case["enhancement_layers"]))


class _Asked(GIFT):
    """With the case's question and content words instead of a processor's."""

    def about(self, span: list[int], offsets: list[int], found: dict[str, Tensor]) -> None:
        object.__setattr__(self, "_about", (span, offsets, found))

    def resolve(self, facts: Any) -> Any:
        return self

    def _question(self, context: LayerContext) -> dict[str, Tensor]:
        (start, end), offsets, _ = self._about  # type: ignore[attr-defined]
        counts = torch.zeros(1, end - start, dtype=torch.long)
        for offset in offsets:
            counts[0, offset] += 1
        asked = torch.zeros_like(context.layout.visual)
        asked[:, start:end] = True
        return {
            "before": torch.tensor([start - 1]),
            "lengths": torch.tensor([end - start]),
            "counts": counts,
            "asked": asked,
        }

    def plan(self, context: LayerContext) -> Any:
        plan = GIFT.plan(self, context)
        if plan is not None:
            self._about[2]["weight"] = context.notes["weight"]  # type: ignore[attr-defined]
            assert float(plan.key_weight.max()) <= math.exp(self.alpha) * 1.0001
        return plan
