"""VASparse's vectors that concern its attention: the penalty on keys that received much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import vasparse_attention
from vlmfix.decoders.vasparse_attention import VASparseAttention, share
from vlmfix.layout import Layout
from vlmfix.method import LayerContext

from .. import mutants
from ..attending import attend, facts, weights
from ..cases import ATTENTION, close

MUTANTS = {
    name: mutant
    for name, mutant in mutants.of_attention(VASparseAttention).items()
    if name in ("sign flipped", "span moved", "heads permuted")
}
MUTANTS["nothing received"] = lambda patch: patch.setattr(
    vasparse_attention, "share", lambda received, there: share(received * 0, there)
)


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    received = arrays["attention_history"].sum(1)[None]
    heads, keys = received.shape[1:]
    layout = Layout.of(torch.zeros(1, keys, dtype=torch.bool))
    close(share(received, layout.valid)[0], arrays["W"], ATTENTION, "shares")
    memory = {"received": received, "there": layout.valid}
    context = LayerContext(0, layout, heads, None, keys - 1, memory, {}, facts(heads))
    plan = VASparseAttention(beta=hyper["beta"]).plan(context)
    assert plan is not None
    assert plan.key_slope is not None
    close(plan.key_slope[0] * arrays["raw_scores"], arrays["reweighted"], ATTENTION, "scores", rtol=1e-5)
    kept = {
        "q": arrays["q"][None, :, None],
        "k": arrays["k"][None],
        "v": arrays["v"][None],
        "mask": arrays["mask"].bool()[None, :, None],
    }
    close(weights(kept, [plan])[0, :, 0], arrays["probs"], ATTENTION, "weights of the kept keys")
    close(attend(kept, [plan])[0, :, 0], arrays["out"], ATTENTION, "output", rtol=1e-5)
