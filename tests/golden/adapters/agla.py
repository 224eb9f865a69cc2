"""AGLA's vectors: the assembly of two views, and the mask from a matching model's attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.decoders import agla
from vlmfix.decoders.agla import AGLA, kept_share
from vlmfix.hf import matching
from vlmfix.method import Step
from vlmfix.views import masked

from .. import mutants
from ..cases import ATTENTION, close, same

MUTANTS = {
    **mutants.of_decoding(AGLA, dropping={"step shifted"}),
    "plausible set dropped": lambda patch: patch.setattr(agla, "keep", lambda scores, allowed: scores),
    "map not padded": lambda patch: (masked.spline.cache_clear(), patch.setattr(masked, "PAD", 1)),
    "share inverted": lambda patch: patch.setattr(masked, "most_relevant", _inverted(masked.most_relevant)),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    {"logits_assembly": _assembly, "mask_from_matching": _mask}[case["kind"]](case, arrays)


def _assembly(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    method = AGLA(case["alpha"], case["beta"])
    scores = method.scores(arrays["logits_global"], Step(1, (arrays["logits_local"],), (), _no_early))
    kept = arrays["expected_keep"].bool()
    same(scores.isfinite(), kept, "plausible set")
    close(scores[kept], arrays["expected_logits"][kept], case["tolerance"], "scores")
    close(scores.softmax(-1), arrays["expected_probs"], case["tolerance"], "probabilities")


def _mask(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    grid = arrays["expected_gradcam"]
    if "cross_attention" in arrays:
        rows, columns = case["patch_grid"]
        grid = matching.gradcam(arrays["cross_attention"], arrays["cross_attention_grad"], (rows, columns))
        close(grid, arrays["expected_gradcam"], 1e-6, "map of the patches")
    masked.spline.cache_clear()
    large = masked.enlarge(grid, 384, 384)
    close(large[4::8, 4::8], arrays["expected_attmap_8x"], ATTENTION, "enlarged map")
    close(large[192], arrays["expected_attmap_row_192"], ATTENTION, "a row of it")
    same(round(kept_share(case["similarity"]) - case["keep_ratio"], 9), 0.0, "share of pixels kept")
    kept = masked.most_relevant(large, kept_share(case["similarity"]))
    same(kept, arrays["expected_mask"].bool(), "mask")


def _no_early(norm: bool) -> Tensor:
    raise AssertionError("not asked for")


def _inverted(original: Any) -> Any:
    return lambda values, share: original(-torch.as_tensor(values), share)
