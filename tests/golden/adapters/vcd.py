"""VCD's vectors: decoding of a tiny Llama with a perturbed branch, and the noise itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmfix.decoders import vcd
from vlmfix.decoders.vcd import VCD
from vlmfix.views import noise

from .. import mutants
from ..cases import ATTENTION, MODEL, close, same
from ..machine import shared_model, spans, with_branches

MUTANTS = {
    **mutants.of_decoding(VCD, dropping={"step shifted"}),
    "noise step shifted": lambda patch: _later_noise(patch),
    "plausible set dropped": lambda patch: patch.setattr(vcd, "keep", lambda scores, allowed: scores),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    {"decode": _decode, "noise": _noise}[case["kind"]](case, arrays, folder)


def _decode(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    method = VCD(alpha=case["hyper"]["alpha"], beta=case["hyper"]["beta"])
    embeds = arrays["inputs_embeds"]
    layout = spans(case, *embeds.shape[:2])
    model = shared_model(folder, case["model"])
    result = with_branches(model, method, embeds, layout, [arrays["inputs_embeds_branch"]], case["steps"])
    same(result.tokens, arrays["tokens"], "tokens")
    for (own, step), _ in result.calls:
        i = step.number - 1
        close(own, arrays["logits"][i], ATTENTION, f"logits of step {i}", rtol=1e-5)
        close(step.branches[0], arrays["logits_branch"][i], ATTENTION, f"branch logits of step {i}", rtol=1e-5)
    close(torch.stack(result.steps), arrays["scores"], MODEL, "scores")


def _noise(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    keep, add = noise.coefficients(case["noise_step"])
    same((round(keep - case["coef_image"], 6), round(add - case["coef_eps"], 6)), (0, 0), "coefficients")
    noised = noise.add_noise(arrays["image"], arrays["eps"], case["noise_step"])
    close(noised, arrays["noised"], ATTENTION, "noised pixels")


def _later_noise(patch: pytest.MonkeyPatch) -> None:
    original = noise.coefficients
    patch.setattr(noise, "coefficients", lambda step: original(step - 1))
