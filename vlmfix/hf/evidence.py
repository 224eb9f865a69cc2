"""What can be read off an answer while it is made, without another forward."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

WORDS = {"yes": ("Yes", "yes", " Yes", " yes", "YES"), "no": ("No", "no", " No", " no", "NO")}
LARGEST = 100.0


class FirstToken(LogitsProcessor):  # type: ignore[misc]
    """Notes when the first token's scores arrive, and by how much they prefer yes to no; changes nothing.

    Args:
        yes: token ids that begin a yes.
        no: token ids that begin a no.
        rows: number of samples; beams of a sample stand next to each other.
    """

    def __init__(self, yes: Sequence[int], no: Sequence[int], rows: int) -> None:
        self._yes, self._no, self._rows = list(yes), list(no), rows
        self._started = time.perf_counter()
        self._margins: Tensor | None = None
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores as they are."""
        if self._margins is None:
            first = scores[:: scores.shape[0] // self._rows].float()
            if self._yes and self._no:
                self._margins = first[:, self._yes].logsumexp(-1) - first[:, self._no].logsumexp(-1)
            else:
                self._margins = torch.full_like(first[:, 0], math.nan)
            if scores.is_cuda:
                torch.cuda.synchronize(scores.device)
            self.seconds = time.perf_counter() - self._started
        return scores

    def listening(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of generate with this processor behind the caller's own."""
        return {**generation, "logits_processor": LogitsProcessorList([*generation.get("logits_processor", ()), self])}

    def of(self, row: int) -> dict[str, float]:
        """Evidence of one sample: `prefill_seconds`, and `margin` (at most 100 in size) where it is defined."""
        found = {"prefill_seconds": self.seconds / self._rows}
        margin = math.nan if self._margins is None else float(self._margins[row])
        if not math.isnan(margin):
            found["margin"] = max(-LARGEST, min(LARGEST, margin))
        return found


def yes_and_no(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that begin a yes and a no; tokens that begin both (a space, say) count for neither."""
    found = {
        name: {ids[0] for word in words if (ids := tokenizer(word, add_special_tokens=False)["input_ids"])}
        for name, words in WORDS.items()
    }
    both = found["yes"] & found["no"]
    return sorted(found["yes"] - both), sorted(found["no"] - both)
