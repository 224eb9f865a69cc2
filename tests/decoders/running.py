"""Short runs of tiny models, with and without a recipe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import TinyVLM
from tests.families.core import released
from vlmfix.api import wrap

RECENT = pytest.mark.skipif(not released("5.23"), reason="older releases cannot do this without any recipe either")
"""Prompts in chunks, beams over rows with different numbers of pictures, processors of some families."""

CHUNKS = pytest.param({"prefill_chunk_size": 5}, marks=RECENT, id="chunks")

OPTIONS = {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
def generate(tiny: TinyVLM, recipe: Any, inputs: Any, new: int = 3, **options: Any) -> Any:
    """Transformers' result under a recipe; the model is restored afterwards."""
    with wrap(tiny.model, None, recipe) as vlm:
        result = vlm.generate(**inputs, max_new_tokens=new, **OPTIONS, **options)
        result.report = vlm.report
    return result


def gap(one: Any, two: Any) -> float:
    """Largest difference of the logits of two results, step by step; infinities must agree."""
    pairs = list(zip(one.logits, two.logits, strict=True))
    return max(float(torch.where(a == b, 0.0, (a - b).abs()).max()) for a, b in pairs)
