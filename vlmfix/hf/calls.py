"""A call of generate, prepared by transformers up to its decoding loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """What loops of our own are handed.

    Args:
        ids: [B, L] prompt ids; L = 0 for a prompt of embeddings.
        processors: logits processors.
        stopping: stopping criteria.
        config: the generation config.
    """

    ids: Tensor
    processors: Any
    stopping: Any
    config: Any

    @property
    def fill(self) -> int:
        """What follows the end of a sequence that is shorter than others."""
        for tokens in (self.config._pad_token_tensor, self.config._eos_token_tensor):
            if tokens is not None:
                return int(tokens.reshape(-1)[0])
        return 0
