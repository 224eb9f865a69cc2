"""SID's vectors: a tiny Llama whose branch sees the least attended visual tokens, chosen anew at every step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlmfix.decoders import sid
from vlmfix.decoders.sid import SID, LeastAttended
from vlmfix.method import Glance

from .. import mutants
from ..cases import same
from ..machine import agree, embedded, generated, shared_model, spans

MUTANTS = {
    **mutants.of_decoding(SID, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(sid, "keep", lambda scores, allowed: scores),
    "layer shifted": lambda patch: patch.setattr(LeastAttended, "acts_on", lambda self, depth: (depth - 1,)),
    "most attended kept": lambda patch: patch.setattr(LeastAttended, "watch", _negated(LeastAttended.watch)),
    "chosen once": lambda patch: patch.setattr(LeastAttended, "watch", _once(LeastAttended.watch)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    method = SID(hyper["alpha"], hyper["beta"], hyper["agg_layer"], hyper["keep_lowest"])
    embeds = arrays["inputs_embeds"]
    layout = spans(case, *embeds.shape[:2])
    kept: list[Tensor] = []
    original = LeastAttended.watch

    def watch(self: LeastAttended, glance: Glance, notes: dict[str, Tensor]) -> bool:
        changed = original(self, glance, notes)
        kept.append((layout.visual[0] & ~notes["hidden"][-1]).nonzero()[:, 0] - case["image_span"][0])
        return changed

    with mock.patch.object(LeastAttended, "watch", watch):
        result = generated(shared_model(folder, case["model"]), method, embedded(embeds, layout), case["steps"])
    same(torch.stack(kept), arrays["kept_idx"].sort(-1).values, "visual tokens left visible")
    agree(result, arrays)


def _negated(original: Any) -> Any:
    return lambda self, glance, notes: original(self, replace(glance, rows=lambda q: -glance.rows(q)), notes)


def _once(original: Any) -> Any:
    def watch(self: Any, glance: Any, notes: dict[str, Tensor]) -> bool:
        return False if "hidden" in notes else bool(original(self, glance, notes))

    return watch
