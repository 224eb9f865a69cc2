"""PAI's vectors: one attention operation, a tiny Llama with and without the text-only contrast, the contrast alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders.pai import PAI
from vlmfix.decoders.pai_guidance import PAIGuidance
from vlmfix.method import AttentionMethod, Step

from .. import mutants
from ..attending import plan_of, same_as_stored, spanned
from ..cases import ATTENTION, MODEL, close, same
from ..machine import llama, with_attention_method, with_branches

COVERS = ("pai", "pai_guidance")
MUTANTS = mutants.of_attention(PAI)
del MUTANTS["heads permuted"]  # all heads are treated alike


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    {"attention": attention, "model": model, "logits": _logits}[case["level"]](case, arrays)


def attention(case: dict[str, Any], arrays: dict[str, Tensor], method: AttentionMethod | None = None) -> None:
    """One operation."""
    rows, heads, _, _ = arrays["q"].shape
    keys = arrays["k"].shape[2]
    layout = spanned(rows, keys, *case["image_span"], case["left_pad"])
    plan = plan_of(method or PAI(alpha=case["alpha"]), layout, heads)
    same_as_stored(arrays, plan, case["ignore_query_rows"])


def model(case: dict[str, Any], arrays: dict[str, Tensor], method: AttentionMethod | None = None) -> None:
    """A tiny model, greedy."""
    layers = tuple(range(case["start_layer"], case["end_layer"]))
    method = method or PAI(alpha=case["alpha"], layers=layers, prompt_row=case["prefill_last_row_modified"])
    embeds = arrays["inputs_embeds"]
    layout = spanned(1, embeds.shape[1], *case["image_span"])
    weights = {name[2:]: value for name, value in arrays.items() if name.startswith("w.")}
    tiny = llama(case["config"], weights)
    if case["gamma"] is None:
        run = with_attention_method(tiny, method, embeds, layout, case["steps"] - 1)
        same(run.tokens, arrays["tokens"][:, :-1], "tokens")
        raw = torch.stack(run.steps, 1)
    else:
        branch = tiny.model.embed_tokens(arrays["text_only_ids"]).detach()
        recipe: Any = [method, PAIGuidance(gamma=case["gamma"])]
        run = with_branches(tiny, recipe, embeds, layout, [branch], case["steps"])
        same(run.tokens, arrays["tokens"], "tokens")
        close(torch.stack(run.steps, 1), arrays["scores_processed"], MODEL, "processed scores", rtol=1e-4)
        raw = torch.stack([own for (own, _), _ in run.calls], 1)
    close(raw, arrays["scores_raw"], MODEL, "raw scores", rtol=1e-4)
    plain = with_attention_method(tiny, PAI(alpha=0), embeds, layout, case["steps"] - 1)
    close(torch.stack(plain.steps, 1), arrays["scores_plain"], MODEL, "plain scores", rtol=1e-4)


def _logits(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    method = PAIGuidance(gamma=case["gamma"], beta=case["cutoff_ratio"])
    for i, (own, text) in enumerate(zip(arrays["scores"], arrays["scores_text_only"], strict=True)):
        step = Step(i + 1, (text,), (), _no_early)
        close(method.scores(own, step), arrays["out"][i], ATTENTION, f"step {i}", rtol=1e-5)


def _no_early(norm: bool) -> Tensor:
    raise AssertionError("not asked for")
