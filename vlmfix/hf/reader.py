"""A text-only language model that reads along: the prompt without pictures, then every token chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.errors import Refusal, UsageError


@dataclass(frozen=True)
class TextModel:
    """A language model and its vocabulary.

    Args:
        name: Hub id or folder.
        model: an AutoModelForCausalLM.
        vocabulary: token -> id.
    """

    name: str
    model: Any
    vocabulary: Mapping[str, int]

    def check(self, vocabulary: Mapping[str, int]) -> None:
        """Compares its tokens with those of another model; either may have tokens beyond the other's last.

        Raises:
            Refusal: an id means different tokens.
        """
        theirs = {i: token for token, i in vocabulary.items()}
        for token, i in self.vocabulary.items():
            if i in theirs and theirs[i] != token:
                raise Refusal(
                    f"{self.name}: token {i} is {token!r} there and {theirs[i]!r} in this model; give a language model "
                    "with the same tokenizer"
                )


@lru_cache(maxsize=1)
def load(name: str) -> TextModel:
    """Loads a language model and its tokenizer; the last one stays in memory.

    Raises:
        UsageError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        return TextModel(name, model, AutoTokenizer.from_pretrained(name).get_vocab())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name!r} could not be loaded as a language model ({error}); give a Hub id or folder"
        ) from error


class Reader:
    """One generation as a language model reads it, with a cache of its own.

    Args:
        text: the language model.
        rows: token ids of each row's prompt, without pictures.
        device: where it runs.

    Raises:
        Refusal: a token that the language model does not have.
    """

    def __init__(self, text: TextModel, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        self._model = text.model.to(device)
        size = self._model.get_input_embeddings().num_embeddings
        unknown = sorted({token for row in rows for token in row if token >= size})
        if unknown:
            raise Refusal(f"{text.name} has {size} tokens and cannot read token {unknown[0]} of the prompt")
        length = max(len(row) for row in rows)
        padded = [[0] * (length - len(row)) + list(row) for row in rows]
        masks = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        self._prompt = torch.tensor(padded, device=device)
        self._mask = self._prompt_mask = torch.tensor(masks, device=device)
        self._cache: Any = None
        self._size = size

    def start(self, repeats: int, keep: bool = True) -> Tensor:
        """Reads the prompt.

        Args:
            repeats: rows per sample.
            keep: whether more tokens will follow through `follow`.

        Returns:
            [rows x repeats, V'] float32 logits of the next token.
        """
        self._cache = DynamicCache(config=self._model.config) if keep else None
        self._mask = self._prompt_mask
        logits = self._read(self._prompt, self._mask)
        if repeats > 1:
            self.take(torch.arange(len(logits), device=logits.device).repeat_interleave(repeats))
        return logits.repeat_interleave(repeats, 0)

    def follow(self, tokens: Tensor) -> Tensor:
        """Reads the tokens [rows, n] chosen since the last call; returns logits as `start`."""
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], 1)
        return self._read(tokens, self._mask)

    def again(self, tokens: Tensor) -> Tensor:
        """Reads the prompt and all tokens [rows, n] chosen so far, without a cache."""
        repeats, self._cache = len(tokens) // len(self._prompt), None
        ids, mask = (x.repeat_interleave(repeats, 0) for x in (self._prompt, self._prompt_mask))
        return self._read(torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1))

    def take(self, rows: Tensor) -> None:
        """Its rows follow those of the model, repeats allowed."""
        self._mask = self._mask[rows.to(self._mask.device)]
        if self._cache is not None:
            self._cache.reorder_cache(rows.to(self._mask.device))

    @torch.no_grad()
    def _read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        kwargs = {"past_key_values": self._cache, "use_cache": self._cache is not None}
        known = tokens.clamp(max=self._size - 1)  # a token it lacks can be chosen, and has no better stand-in
        out = self._model(input_ids=known, attention_mask=mask, position_ids=positions, **kwargs)
        logits: Tensor = out.logits[:, -1].float()
        return logits
