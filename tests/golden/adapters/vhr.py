"""VHR's vectors: divergence and selection, and a tiny Llama's greedy decoding with reinforced heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import vhr, vhr_local
from vlmfix.decoders.groups import last_prompt_row
from vlmfix.decoders.vhr import VHR, Reinforce
from vlmfix.decoders.vhr_local import VHRLocal
from vlmfix.diagnostics import measures, offline
from vlmfix.hf.hooks import installed
from vlmfix.method import Glance

from .. import mutants
from ..attending import spanned
from ..cases import ATTENTION, close, same
from ..machine import llama, with_attention_method

MUTANTS = {
    "outliers kept": lambda patch: patch.setattr(vhr, "surging", lambda a, b: torch.zeros_like(a, dtype=torch.bool)),
    "the other half": lambda patch: patch.setattr(vhr, "diverging", lambda d: d <= d.median(-1, keepdim=True).values),
    "heads permuted": mutants.of_attention(VHR)["heads permuted"],
    "layer shifted": mutants.of_attention(VHR)["layer shifted"],
    "starts one row late": mutants.of_attention(VHR)["starts one row late"],
    "branches swapped": lambda patch: patch.setattr(Reinforce, "__call__", _swapped(Reinforce.__call__)),
}
LOGITS = 1e-4


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    {"divergence_and_selection": _selection, "tiny_model_end_to_end": _model}[case["kind"]](case, arrays)


def _selection(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    seeing, blind = arrays["head_out_image"], arrays["head_out_text"]
    divergence, activation = (seeing - blind).norm(dim=-1), blind.square().sum(-1)
    close(divergence, arrays["expected_vhd"], ATTENTION, "divergence")
    close(activation, arrays["expected_ta"], ATTENTION, "activation")
    outliers = vhr.surging(divergence, activation)
    same(outliers, arrays["expected_outlier"].bool(), "outliers")
    same(Reinforce(2.0)(seeing, blind) == 2, arrays["expected_selected"].bool(), "chosen heads")


def _model(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    weights = {name: value for name, value in arrays.items() if not name.startswith("io.")}
    tiny, embeds = llama(case["config"], weights), arrays["io.inputs_embeds"]
    layout = spanned(1, embeds.shape[1], *case["visual_span"])
    method = VHR(
        alpha=case["alpha"],
        layers=tuple(case["reinforced_layers"]),
        second_layer=False,
        reinforce_text=case["text_branch_reinforced"],
    )
    for prefix, chosen in (("expected", method), ("plain", VHR(alpha=1))):
        run = with_attention_method(tiny, chosen, embeds, layout, case["steps"] - 1)
        tokens = torch.stack(run.steps).argmax(-1)[:, 0]
        same(tokens, arrays[f"io.{prefix}_tokens"], f"{prefix} tokens")
        close(torch.cat(run.steps), arrays[f"io.{prefix}_logits"], LOGITS, f"{prefix} logits")
    tokens, inputs = arrays["io.plain_tokens"][None], {"inputs_embeds": embeds, "visual_mask": layout.visual}
    with installed(tiny, require_pictures=False):
        gaps = offline.vision_divergence(tiny, inputs, tokens)
    curve = measures.t_vhd(gaps, case["t_vhd_top_k"])[:, 0]
    close(curve, arrays["io.expected_t_vhd"], LOGITS, "T-VHD", rtol=1e-5)
    seen: dict[int, tuple[Tensor, ...]] = {}
    with_attention_method(tiny, _Observer(layers=(0.0, 1.0)).into(seen), embeds, layout, 1)
    divergence, _, mass = (torch.cat([seen[layer][i] for layer in sorted(seen)]) for i in range(3))
    close(divergence, arrays["io.expected_local_vhd"], 1e-5, "local divergence")
    close(mass, arrays["io.expected_visual_mass"], ATTENTION, "visual mass")


class _Observer(VHRLocal):
    """Notes the local divergence of every layer and leaves all heads as they are."""

    def into(self, seen: dict[int, tuple[Tensor, ...]]) -> VHRLocal:
        object.__setattr__(self, "_seen", seen)
        return self

    def resolve(self, facts: Any) -> Any:
        return self

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        if "scale" not in glance.context.memory:
            found = vhr_local.local_divergence(glance, last_prompt_row(glance, "this test"))
            self._seen[glance.context.layer] = found  # type: ignore[attr-defined]
            glance.context.memory["scale"] = torch.ones_like(found[0])
        return False


def _swapped(original: Any) -> Any:
    return lambda self, seeing, blind: original(self, blind, seeing * 0)
