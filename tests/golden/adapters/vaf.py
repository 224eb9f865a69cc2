"""VAF's vectors: one attention operation, or a tiny Llama's prefill and decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders.vaf import VAF

from .. import mutants
from ..attending import plan_of, same_as_stored, spanned, weights
from ..cases import ATTENTION, MODEL, close, same
from ..machine import llama, with_attention_method

MUTANTS = mutants.of_attention(VAF)
del MUTANTS["heads permuted"]  # all heads are treated alike


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    assert case["system_span"] == [0, case["image_span"][0]]
    {"attention": _attention, "model": _model}[case["level"]](case, arrays)


def _attention(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    rows, heads, _, _ = arrays["q"].shape
    layout = spanned(rows, arrays["k"].shape[2], *case["image_span"])
    plan = plan_of(_method(case, (0,)), layout, heads)
    assert plan is not None
    same_as_stored(arrays, plan)
    if "attn_out_last" in arrays:
        close(weights(arrays, [plan])[:, :, -1], arrays["attn_out_last"], ATTENTION, "weights of the last row")


def _model(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    tensors = {name[2:]: value for name, value in arrays.items() if name.startswith("w.")}
    tiny, embeds, steps = llama(case["config"], tensors), arrays["inputs_embeds"], case["decode_steps"]
    layout = spanned(1, embeds.shape[1], *case["image_span"])
    method = _method(case, tuple(range(case["first_layer"], case["last_layer"] + 1)))
    for suffix, chosen in (("", method), ("_plain", VAF(alpha=0, beta=0))):
        run = with_attention_method(tiny, chosen, embeds, layout, steps)
        same(run.tokens, arrays[f"tokens{suffix}"], f"tokens{suffix}")
        close(run.prefill, arrays[f"logits_prefill{suffix}"], MODEL, f"prefill{suffix}", rtol=1e-4)
        close(torch.stack(run.steps[1:], 1), arrays[f"logits_decode{suffix}"], MODEL, f"decode{suffix}", rtol=1e-4)
    assert method.acts_on(case["config"]["num_hidden_layers"]) == VAF().acts_on(32) == tuple(range(9, 15))


def _method(case: dict[str, Any], layers: tuple[int, ...]) -> VAF:
    return VAF(alpha=case["enh"] - 1, beta=1 - case["sup"], layers=layers)
