"""AvisC's vectors: a tiny Llama whose branch sees the picture through its blind tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import avisc
from vlmfix.decoders.avisc import AvisC

from .. import mutants
from ..cases import ATTENTION, close, same
from ..machine import agree, beside_another, embedded, generated, shared_model, spans

MUTANTS = {
    **mutants.of_decoding(AvisC, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(avisc, "keep", lambda scores, allowed: scores),
    "span moved": lambda patch: patch.setattr(AvisC, "wiped", _moved(AvisC.wiped)),
    "all layers": lambda patch: patch.setattr(avisc, "blind_tokens", _all_layers(avisc.blind_tokens)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper, (start, end) = case["hyper"], case["image_span"]
    method = AvisC(hyper["alpha"], hyper["beta"], hyper["layer_gamma"], hyper["lambda_"], hyper["masking_scheme"])
    model, embeds = shared_model(folder, case["model"]), arrays["inputs_embeds"]
    layout = spans(case, *embeds.shape[:2])
    result = generated(model, method, embedded(embeds, layout), case["steps"], also="wiped")
    ((notes, _, _), wiped), *_ = result.others
    same(wiped[0, start:end].nonzero()[:, 0], arrays["masked_idx"], "wiped tokens")
    same(int(wiped.sum()), case["num_masked"], "number of wiped tokens")
    rows = torch.stack(list(notes.values()))[:, 0, start:end]
    share = rows.sum(-1) / rows.sum()
    close(share, arrays["layer_portion"], ATTENTION, "share of each layer")
    if "attn_last_row" in arrays:
        close(rows, arrays["attn_last_row"].mean(1), ATTENTION, "last row of attention")
    agree(result, arrays)
    agree(generated(model, method, beside_another(embeds, layout), case["steps"]).row(1), arrays)


def _moved(original: Any) -> Any:
    return lambda self, notes, layout, visible: original(self, notes, layout, visible).roll(1, -1)


def _all_layers(original: Any) -> Any:
    return lambda rows, visual, layer_gamma, lamb: original(rows, visual, 1.0, lamb)
