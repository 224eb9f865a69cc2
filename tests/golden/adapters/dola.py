"""DoLa's vectors: a tiny Llama contrasted with its own earlier layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlmfix.decoders import dola
from vlmfix.decoders.dola import DoLa, layer_divergence
from vlmfix.method import Step

from ..cases import close, same
from ..machine import generated, shared_model

REBUILT = 5e-5
"""The reference decoded with a cache of another version of transformers."""

MUTANTS = {
    "plausible set dropped": lambda patch: patch.setattr(dola, "keep", lambda scores, allowed: scores),
    "layer shifted": lambda patch: patch.setattr(DoLa, "taps", _next(DoLa.taps)),
    "true Jensen-Shannon": lambda patch: patch.setattr(dola, "layer_divergence", _js(layer_divergence)),
    "normalised": lambda patch: patch.setattr(DoLa, "scores", _normalised(DoLa.scores)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    layers = tuple(hyper.get("candidate_layers") or [hyper["base_layer"]])
    method = DoLa(layers=layers, beta=hyper["relative_top"], shared=True)
    ids = arrays["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen, original = [], DoLa.scores

    def scores(self: DoLa, logits: Tensor, step: Step) -> Tensor:
        seen.append(step.early(False))
        return original(self, logits, step)

    with mock.patch.object(DoLa, "scores", scores):
        result = generated(shared_model(folder, case["model"]), method, inputs, case["steps"])
    same(result.tokens, arrays["tokens"], "tokens")
    for (own, step), _ in result.calls:
        i = step.number - 1
        close(own, arrays[f"layer_logits_{hyper['mature_layer']}"][i], REBUILT, f"logits of step {i}")
        early = seen[i]
        stored = torch.stack([arrays[f"layer_logits_{layer}"][i] for layer in layers])
        close(early, stored, REBUILT, f"early logits of step {i}")
        if "divergence" in arrays:
            distance = layer_divergence(own.log_softmax(-1), early.log_softmax(-1), "reference").mean(1)
            close(distance, arrays["divergence"][i], REBUILT, f"divergence of step {i}")
            same(layers[int(distance.argmax())], int(arrays["chosen_layer"][i]), f"layer of step {i}")
    close(torch.stack(result.steps), arrays["scores"], REBUILT, "scores")


def _next(original: Any) -> Any:
    return lambda self, depth: tuple(layer + 1 for layer in original(self, depth))


def _js(original: Any) -> Any:
    return lambda own, early, kind: original(own, early, "js")


def _normalised(original: Any) -> Any:
    def scores(self: Any, logits: Tensor, step: Any) -> Tensor:
        from dataclasses import replace

        return original(replace(self, norm=True), logits, step)

    return scores
