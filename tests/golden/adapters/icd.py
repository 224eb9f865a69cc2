"""ICD's vectors: a tiny Llama with a longer disturbed prompt, with disturbed visual queries, and with noise besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import icd
from vlmfix.decoders.icd import ICD
from vlmfix.views.text import Inserted

from .. import mutants
from ..cases import same
from ..machine import agree, generated, shared_model, spans, with_branches

MUTANTS = {
    **mutants.of_decoding(ICD, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(icd, "keep", lambda scores, allowed: scores),
    "disturbance moved": lambda patch: patch.setattr(Inserted, "text", _later(Inserted.text)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    model = shared_model(folder, case["model"])
    hyper = case["hyper"]
    if "input_ids" in arrays:
        for row in range(case["batch"]):
            _longer(model, hyper, case["disturbance_inserted_at"], {k: _row(k, v, row) for k, v in arrays.items()})
        return
    embeds = arrays["inputs_embeds"]
    branches = [arrays[name] for name in ("inputs_embeds_branch", "inputs_embeds_branch2") if name in arrays]
    method = ICD(**hyper, disturbance_ids=(1,), noise_step=500 if len(branches) == 2 else None, total=True)
    assert len(method.branches()) == len(branches)
    agree(with_branches(model, method, embeds, spans(case, *embeds.shape[:2]), branches, case["steps"]), arrays)


def _longer(model: Any, hyper: dict[str, Any], at: int, arrays: dict[str, Tensor]) -> None:
    """One row whose branch the method makes itself: the disturbance goes behind a picture that ends there."""
    ids, disturbed = arrays["input_ids"], arrays["input_ids_branch"]
    more = disturbed.shape[1] - ids.shape[1]
    same(torch.cat([disturbed[:, :at], disturbed[:, at + more :]], 1), ids, "prompt without the disturbance")
    method = ICD(**hyper, place="last", disturbance_ids=tuple(disturbed[0, at : at + more].tolist()))
    visual = torch.zeros_like(ids, dtype=torch.bool)
    visual[:, 1:at] = True
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "visual_mask": visual}
    agree(generated(model, method, inputs, arrays["tokens"].shape[1]), arrays)


def _row(name: str, values: Tensor, row: int) -> Tensor:
    return values[:, row : row + 1] if name in ("logits", "logits_branch", "scores") else values[row : row + 1]


def _later(original: Any) -> Any:
    def text(self: Any, row: Any) -> list[Any]:
        steps = original(self, row)
        at = next(i for i, step in enumerate(steps) if isinstance(step, tuple))
        return [
            *steps[:at],
            *steps[at + len(self.ids) :][:1],
            *steps[at:][: len(self.ids)],
            *steps[at + len(self.ids) + 1 :],
        ]

    return text
