"""Decoder blocks compiled for the steps of one engine, and only for these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vlmfix.hf.parts import Parts

SETTINGS: dict[str, Any] = {"dynamic": False}
"""Keywords of torch.compile; a block is one graph, but for hooks that others left on its parts."""

FORMS = 16
"""Most forms of a block that are compiled for each layer: shapes of batches, kinds of plans."""


class Blocks:
    """Compiled forwards of a model's decoder blocks.

    Args:
        parts: the model.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._forwards: dict[int, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Within the block decoder blocks run compiled."""
        from torch._dynamo import config  # kept from the time when nothing is compiled

        limit = FORMS * len(self._parts.blocks)
        blocks: dict[int, Any] = dict(self._parts.blocks)
        for layer, block in blocks.items():
            if layer not in self._forwards:
                self._forwards[layer] = torch.compile(block.forward, **SETTINGS)
        try:
            for layer, block in blocks.items():
                block.forward = self._forwards[layer]
            with config.patch(recompile_limit=limit, accumulated_recompile_limit=limit):
                yield
        finally:
            for block in blocks.values():
                vars(block).pop("forward", None)
