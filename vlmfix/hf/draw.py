"""Sampling that does not depend on batch, order or world size: the inverse CDF of a hashed uniform."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

BLOCK = 64


class SeededDraw(LogitsProcessor):  # type: ignore[misc]
    """The last processor of a sampling run: warps, draws by inverse CDF, leaves one possible token per row.

    Args:
        seed: of the run.
        items: name of each sample of the batch.
        repeats: return sequences per sample; their index is part of the draw.
        warpers: temperature, top-k, top-p and the like, applied before the draw.
        keep_scores: keep the warped scores of every step, which the caller asked for.
    """

    def __init__(
        self,
        seed: int,
        items: Sequence[str],
        repeats: int,
        warpers: LogitsProcessorList,
        keep_scores: bool,
    ) -> None:
        keys = [row_key(seed, item, sample) for item in items for sample in range(repeats)]
        self.keys = np.array(keys, dtype=np.uint64)
        self._prompt_length: int | None = None
        self.warpers = warpers
        self.scores: list[Tensor] | None = [] if keep_scores else None
        self._uniforms = torch.empty(0)
        self._first = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, V] scores -> 0 at the drawn token, -inf elsewhere."""
        if self._prompt_length is None:  # families differ in whether the prompt is among the ids
            self._prompt_length = input_ids.shape[1]
        step = input_ids.shape[1] - self._prompt_length
        if not self._first <= step < self._first + self._uniforms.shape[-1]:
            self._first = step
            self._uniforms = torch.from_numpy(uniforms(self.keys, step, BLOCK)).to(scores.device)
        warped = self.warpers(input_ids, scores)
        if self.scores is not None:
            self.scores.append(warped)
        drawn = inverse_cdf(warped, self._uniforms[:, step - self._first])
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn[:, None], 0.0)


def inverse_cdf(scores: Tensor, u: Tensor) -> Tensor:
    """Token of each row whose cumulative probability first exceeds u.

    Args:
        scores: [B, V] logits or log-probabilities.
        u: [B] float32 in [0, 1).

    Returns:
        [B] token ids.
    """
    cdf = scores.float().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    last = (scores.shape[1] - 1 - (scores.flip(-1) > float("-inf")).float().argmax(-1)).long()
    return torch.minimum(drawn, last)


def row_key(seed: int, item: str, sample: int) -> int:
    """64-bit key of one sample's random stream."""
    digest = hashlib.sha256(f"{seed}\x00{item}\x00{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def uniforms(keys: NDArray[np.uint64], first: int, count: int) -> NDArray[np.float32]:
    """[rows, count] float32 in [0, 1) for steps first .. first + count - 1 (SplitMix64 of key and step)."""
    steps = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = keys[:, None] + steps[None, :] * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    high: NDArray[np.float32] = (x >> np.uint64(40)).astype(np.float32)
    return high * np.float32(2.0**-24)
