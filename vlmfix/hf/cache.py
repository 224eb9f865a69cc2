"""Caches whose rows include branches, and that carry the state of their generation."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer


class Rows(Protocol):
    """Per-row state that must follow the rows of a cache."""

    def take(self, rows: torch.Tensor) -> None:
        """Keeps the given rows, repeats allowed."""
        ...


class BranchRows:
    """Mixin: callers reorder visible rows, the cache moves the branch rows and the request's state with them.

    Rows stand as [visible, branch 1, branch 2, ...], each block in the caller's order.
    """

    copies: int = 1
    state: Rows | None = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Moves every block of rows by the same beam index [visible rows]."""
        beams = len(beam_idx)
        self._take(torch.cat([beam_idx + i * beams for i in range(self.copies)]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; blocks stay blocks."""
        self._take(torch.arange(self._rows()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some visible rows and their branches."""
        rows = self._rows() // self.copies
        self._take(torch.cat([indices + i * rows for i in range(self.copies)]))

    def keep(self, rows: int) -> None:
        """Keeps the first rows; the request's state is left to the caller."""
        super().reorder_cache(torch.arange(rows, device=self._device()))  # type: ignore[misc]

    def repeat(self, repeats: int, rows: int, device: Any) -> None:
        """Repeats each of `rows` rows, the request's state excepted (it repeats itself)."""
        super().reorder_cache(torch.arange(rows, device=device).repeat_interleave(repeats))  # type: ignore[misc]

    def _rows(self) -> int:
        return next(layer.keys.shape[0] for layer in self.layers if getattr(layer, "keys", None) is not None)  # type: ignore[attr-defined, no-any-return]

    def _device(self) -> Any:
        return next(layer.keys.device for layer in self.layers if getattr(layer, "keys", None) is not None)  # type: ignore[attr-defined]

    def _take(self, rows: torch.Tensor) -> None:
        super().reorder_cache(rows)  # type: ignore[misc]
        if self.state is not None:
            self.state.take(rows)


def only_full_attention(config: Any) -> bool:
    """Whether every layer of a text decoder keeps all keys: no windows, no chunks, no running states."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def drop_last(cache: Any, count: int, length: int) -> None:
    """Forgets the last slots of a cache without windows or running states.

    Args:
        cache: the cache.
        count: number of slots.
        length: slots that stay.
    """
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:
            continue
        if layer.keys.shape[2] == length + count:
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        else:  # of fixed size: the slots are written again, until then nothing looks at them
            layer.keys[:, :, length : length + count] = 0
            layer.values[:, :, length : length + count] = 0
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length -= count


def merge(upper: Any, rows: torch.Tensor, lower: Any) -> None:
    """Keeps some rows of one cache and puts the rows of another beneath them, running states included."""
    for a, b in zip(upper.layers, lower.layers, strict=True):
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            if getattr(a, name, None) is not None:
                setattr(a, name, _joined(getattr(a, name), rows, getattr(b, name)))


def _joined(upper: Any, rows: torch.Tensor, lower: Any) -> Any:
    """One tensor, or a dictionary of them in which some may be absent."""
    if isinstance(upper, dict):
        return {key: None if value is None else _joined(value, rows, lower[key]) for key, value in upper.items()}
    return torch.cat([upper[rows], lower])


class BranchCache(BranchRows, DynamicCache):  # type: ignore[misc]
    """Growing cache with branch rows."""


class StaticBranchCache(BranchRows, StaticCache):  # type: ignore[misc]
    """Fixed-size cache with branch rows."""
