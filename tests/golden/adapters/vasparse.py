"""VASparse's vectors that concern its contrast: the paper's equation 6 and the released arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from vlmfix.decoders import vasparse_contrast
from vlmfix.decoders.vasparse_contrast import VASparseContrast
from vlmfix.method import Step

from ..cases import ATTENTION, close, same
from . import vasparse_attention

MUTANTS = {
    "plausible set dropped": lambda patch: patch.setattr(vasparse_contrast, "keep", lambda scores, allowed: scores),
    "contrast dropped": lambda patch: patch.setattr(vasparse_contrast, "contrast", lambda x, y, w: x),
    "alpha doubled": lambda patch: patch.setattr(VASparseContrast, "scores", _doubled(VASparseContrast.scores)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper = case["hyper"]
    if "combined" in arrays:
        scores = _scores(
            VASparseContrast(hyper["alpha"], hyper["plausibility_beta"]), "logits", "contrast_logits", arrays
        )
        close(scores, arrays["combined"], ATTENTION, "scores")
        close(scores.log_softmax(-1), arrays["log_probs"], ATTENTION, "log-probabilities")
    elif "contrast" in arrays:
        method = VASparseContrast(hyper["contrastive_rate"], hyper["relative_top"], "reference")
        scores = _scores(method, "final_logits", "embedding_logits", arrays)
        close(scores, arrays["log_probs"], ATTENTION, "log-probabilities")
        same(scores.isfinite(), arrays["filtered"].isfinite(), "plausible set")
    elif "attention_history" in arrays:
        vasparse_attention.check(case, arrays, folder)
    else:
        pytest.skip("concerns the sparse cache, which is not part of the contrast")


def _scores(method: VASparseContrast, own: str, embedded: str, arrays: dict[str, Tensor]) -> Tensor:
    return method.scores(arrays[own], Step(1, (), (0,), lambda norm: arrays[embedded][None]))


def _doubled(original: Any) -> Any:
    from dataclasses import replace

    return lambda self, logits, step: original(replace(self, alpha=2 * self.alpha), logits, step)
