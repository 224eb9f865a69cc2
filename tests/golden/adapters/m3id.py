"""M3ID's vectors: decoding of a tiny Llama with a branch that lacks the picture's positions, and the gate rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import m3id
from vlmfix.decoders.m3id import M3ID
from vlmfix.layout import Layout
from vlmfix.method import Step
from vlmfix.view import RowText
from vlmfix.views.text import WithoutPictures

from .. import mutants
from ..cases import ATTENTION, MODEL, close, same
from ..machine import shared_model, spans, with_branches

MUTANTS = {
    **mutants.of_decoding(M3ID),
    "span moved": lambda patch: patch.setattr(WithoutPictures, "text", _one_off(WithoutPictures.text)),
    "plausible set dropped": lambda patch: patch.setattr(m3id, "keep", lambda scores, allowed: scores),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    settings = {name: hyper[name] for name in ("forget_rate", "beta", "gate") if name in hyper}
    method = M3ID(**settings)
    if case.get("kind") == "logits only":
        _gate(method, hyper["t"], arrays)
        return
    assert hyper["first_t"] == 1
    embeds, steps = arrays["inputs_embeds"], case["steps"]
    layout = spans(case, *embeds.shape[:2])
    model = shared_model(folder, case["model"])
    result = with_branches(model, method, embeds, layout, [_without(method, embeds, layout)], steps)
    same(result.tokens, arrays["tokens"].view(-1, steps), "tokens")
    rows = len(embeds)
    for (own, step), _ in result.calls:
        i = step.number - 1
        close(own, arrays["logits"][i].view(rows, -1), ATTENTION, f"logits of step {i}", rtol=1e-5)
        close(step.branches[0], arrays["logits_branch"][i].view(rows, -1), ATTENTION, f"branch, step {i}", rtol=1e-5)
        close(torch.tensor(method.weight(step.number)), arrays["weights"][i], 1e-6, "weight", rtol=1e-6)
    scores = torch.stack(result.steps)
    close(scores, arrays["scores"].view_as(scores), MODEL, "scores")


def _gate(method: M3ID, t: int, arrays: dict[str, Tensor]) -> None:
    scores = method.scores(arrays["logits"], Step(t, (arrays["logits_branch"],), (), _no_early))
    close(scores, arrays["scores"], ATTENTION, "scores")
    own = arrays["logits"].log_softmax(-1)
    same((scores != own).any(-1), arrays["applied"], "rows under the gate")


def _no_early(norm: bool) -> Tensor:
    raise AssertionError("not asked for")


def _without(method: M3ID, embeds: Tensor, layout: Layout) -> Tensor:
    """Embeddings of the positions that the method's own view keeps."""
    view = method.branches()[0]
    rows = []
    for row, kinds in zip(embeds, layout.kinds.tolist(), strict=True):
        kept = view.text(RowText([0] * len(kinds), kinds, [False] * len(kinds)))
        rows.append(row[[i for i in kept if isinstance(i, int)]])
    return torch.stack(rows)


def _one_off(original: Any) -> Any:
    def text(self: Any, row: RowText) -> list[int | tuple[int]]:
        kinds = list(row.kinds)
        return list(original(self, RowText(row.ids, kinds[1:] + kinds[:1], row.structure)))

    return text
