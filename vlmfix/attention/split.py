"""A prefill in two parts beneath one forward: the last prompt token runs after all layers have read the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfix.hf.branching import REPLACED, positions_of
from vlmfix.hf.inputs import TOKEN_KEYS
from vlmfix.hf.parts import Parts
from vlmfix.layout import Layout

LOGITS = "logits_to_keep"


class SplitPrefill:
    """Runs the tokens before the last one when their forward begins, and puts the outputs together when it ends.

    Args:
        parts: the model.
        cache: makes an empty cache, where the caller brings none.
    """

    def __init__(self, parts: Parts, cache: Callable[[], Any]) -> None:
        self.parts = parts
        self._cache = cache
        self._first: Any = None
        self._kept = self._last_only = True

    def before(self, kwargs: dict[str, Any], layout: Layout, pictures: frozenset[str]) -> dict[str, Any]:
        """Keywords for the last prompt token alone, the tokens before it being in the cache.

        Args:
            kwargs: keywords of the forward.
            layout: the prompt, rows not yet repeated.
            pictures: names of the picture inputs, which the last token does not need.
        """
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        entry: Tensor = kwargs[name]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past + entry.shape[1] != layout.length or entry.shape[1] == 1:
            return kwargs
        shared = {**kwargs, "use_cache": True, "past_key_values": self._cache() if cache is None else cache}
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):  # ready-made for a static cache
            mask = layout.valid.long().repeat_interleave(entry.shape[0] // layout.rows, 0)
        positions = kwargs.get("position_ids")
        if positions is None and past == 0:
            whole = torch.ones(entry.shape[:2], dtype=torch.long, device=entry.device) if mask is None else mask
            positions = positions_of(self.parts, entry, {**kwargs, "attention_mask": whole})
        shared |= {"attention_mask": mask, "position_ids": positions}
        first, last = {**shared, name: entry[:, :-1]}, {**shared, name: entry[:, -1:]}
        for key in TOKEN_KEYS:
            if isinstance(value := shared.get(key), Tensor):
                first[key] = value[..., :-1]
                last[key] = value if key == "attention_mask" else value[..., -1:]
        self._last_only = bool(kwargs.get(LOGITS))
        if self._last_only:
            first[LOGITS] = last[LOGITS] = 1
        self._kept = cache is not None or bool(kwargs.get("use_cache", True))
        self._first = self.parts.top.forward(**first)
        dropped = pictures - set(TOKEN_KEYS) - set(REPLACED) | {"mm_encoder_outputs"}
        return {key: value for key, value in last.items() if key not in dropped}

    def after(self, output: Any) -> Any:
        """What both parts returned, put together."""
        first, self._first = self._first, None
        if first is None:
            return output
        if not self._last_only:
            output["logits"] = torch.cat([first.logits, output.logits], 1)
        if output.get("hidden_states"):
            pairs = zip(first.hidden_states, output.hidden_states, strict=True)
            output["hidden_states"] = tuple(torch.cat(pair, 1) for pair in pairs)
        return output if self._kept else type(output)(**{k: v for k, v in output.items() if k != "past_key_values"})
