"""IAVA's vectors: a tiny Llama asked in general and in particular; they check our reading of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import iava
from vlmfix.decoders.iava import IAVA

from .. import mutants
from ..cases import ATTENTION, close, same
from ..machine import agree, beside_another, embedded, generated, shared_model, spans

MUTANTS = {
    **mutants.of_decoding(IAVA, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(iava, "keep", lambda scores, allowed: scores),
    "sign flipped": lambda patch: patch.setattr(iava, "irrelevant_tokens", _flipped(iava.irrelevant_tokens)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper, (start, end) = case["hyper"], case["image_span"]
    model, embeds = shared_model(folder, case["model"]), arrays["inputs_embeds"]
    ids = _learn(model, arrays["inputs_embeds_general"][0, end:])
    method = IAVA(hyper["alpha"], hyper["beta"], hyper["lambda_"], instruction_ids=ids)
    layout = spans(case, *embeds.shape[:2])
    result = generated(model, method, embedded(embeds, layout), case["steps"], also="wiped")
    ((notes, both, _), wiped), *_ = result.others
    question, general = torch.stack(list(notes.values())).mean(0)
    close(question[both.visual[0]], arrays["attn_query"], ATTENTION, "attention under the question")
    close(general[both.visual[1]], arrays["attn_general"], ATTENTION, "attention under the instruction")
    wiped = wiped[:, -layout.length :]
    same(wiped[0, start:end].nonzero()[:, 0], arrays["masked_idx"], "wiped tokens")
    same(int(wiped.sum()), len(arrays["masked_idx"]), "number of wiped tokens")
    agree(result, arrays)
    agree(generated(model, method, beside_another(embeds, layout), case["steps"]).row(1), arrays)


def _learn(model: Any, embeds: Tensor) -> tuple[int, ...]:
    """Gives the model tokens with these embeddings, which it can read but not say."""
    table = model.get_input_embeddings().weight.detach()
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([table, embeds])))
    return tuple(range(len(table), len(table) + len(embeds)))


def _flipped(original: Any) -> Any:
    return lambda question, general, real, lamb: original(general, question, real, lamb)
