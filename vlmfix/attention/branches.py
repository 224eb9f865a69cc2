"""The forwards of a joint prompt: branch rows added to the keywords, taken off the outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.branching import REPLACED, Joint, repeat_pictures
from vlmfix.hf.cache import BranchRows
from vlmfix.hf.inputs import TOKEN_KEYS
from vlmfix.layout import MaskKind


class BranchRun:
    """Keeps masks and positions of visible and branch rows from one forward to the next.

    Args:
        joint: the joint prompt.
        prompt_length: K of the visible prompt.
    """

    def __init__(self, joint: Joint, prompt_length: int) -> None:
        self.joint = joint
        self.prompt_length = prompt_length
        self.repeats = 1
        self._mask = joint.mask
        self._padded = not bool(joint.mask.all())
        self._last = joint.positions[..., -1:]
        self._shown: int | None = prompt_length

    def first(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The prefill: one row per sample and branch, however often generate has repeated them."""
        self.repeats = self.rows(kwargs) // self.joint.visible
        mask = {"attention_mask": self._given}
        return {**self.rest(kwargs, self.joint.inputs), **self.joint.inputs, **mask}

    @property
    def _given(self) -> Tensor | None:
        """The mask as the model gets it: none where nothing is padded, so that it need not look at it at every step."""
        return self._mask if self._padded else None

    def again(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without a cache: the whole joint prompt again, with the tokens generated so far.

        Raises:
            Refusal: the prompt consists of embeddings.
        """
        joint, ids = self.joint, kwargs.get("input_ids")
        if ids is None or "inputs_embeds" in joint.inputs:
            raise Refusal("branches of a prompt of embeddings need the cache; set use_cache=True")
        n = ids.shape[0] // joint.visible
        new = ids[:, self.prompt_length :].repeat(joint.copies, 1)
        self._shown = self.prompt_length + new.shape[1]
        out = self.rest(kwargs, joint.inputs)
        pictures: dict[str, Any] = {}
        for key, value in joint.inputs.items():
            if key == "position_ids":
                continue
            if key in ("input_ids", "attention_mask", *TOKEN_KEYS):
                more = new if key == "input_ids" else torch.full_like(new, self._filler(key))
                out[key] = torch.cat([value.repeat_interleave(n, 0), more.to(value.dtype)], 1)
            else:
                pictures[key] = value
        base = joint.positions.repeat_interleave(n, -2)
        ahead = base[..., -1:] + torch.arange(1, new.shape[1] + 1, device=ids.device)
        pictures = repeat_pictures(joint, pictures, n) if n > 1 else pictures
        return {**out, **pictures, "position_ids": torch.cat([base, ahead], -1)}

    def _filler(self, key: str) -> int:
        """What a per-token input holds for generated tokens: seen, and behind a prompt that is a prefix."""
        behind = key == "token_type_ids" and self.joint.layout.mask == MaskKind.PREFIX
        return int(key == "attention_mask" or behind)

    def following(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A step with a cache: every branch is fed the visible rows' tokens."""
        ids: Tensor = kwargs["input_ids"].repeat(self.joint.copies, 1)
        self._shown = None
        self._mask = torch.cat([self._mask, self._mask.new_ones(ids.shape)], 1)
        positions = self._last + torch.arange(1, ids.shape[1] + 1, device=ids.device)
        self._last = positions[..., -1:]
        out = {k: v for k, v in kwargs.items() if k not in REPLACED}
        for key in TOKEN_KEYS:
            if isinstance(out.get(key), Tensor):
                out[key] = out[key][:, -ids.shape[1] :].repeat(self.joint.copies, 1)
        return {**out, "input_ids": ids, "attention_mask": self._given, "position_ids": positions}

    def spread(self, output: Any) -> Tensor:
        """After a prefill: logits, cache, masks and positions repeated for beams or return sequences."""
        n, logits = self.repeats, output.logits
        cache = output.get("past_key_values")
        if n > 1 and isinstance(cache, BranchRows):
            cache.repeat(n, logits.shape[0], logits.device)
            self._mask = self._mask.repeat_interleave(n, 0)
            self._last = self._last.repeat_interleave(n, -2)
        spread: Tensor = logits.repeat_interleave(n, 0)
        return spread

    def standing(self) -> tuple[Tensor, Tensor]:
        """[rows, K] bool slots that are no padding, and [..., rows, 1] position ids of the last tokens fed."""
        return self._mask.bool(), self._last

    def drop(self) -> int:
        """Forgets the last block of rows.

        Returns:
            Number of rows that stay.
        """
        kept = len(self._mask) // self.joint.copies * (self.joint.copies - 1)
        self.joint = replace(self.joint, copies=self.joint.copies - 1)
        self._mask, self._last = self._mask[:kept], self._last[..., :kept, :]
        return kept

    def cut(self, values: Tensor, front: int = 0) -> Tensor:
        """[rows, Q, ...] without the positions before the caller's prompt, which longer branches brought.

        Args:
            values: of one forward.
            front: positions that its last axis has too many; for attention weights [rows, H, Q, K].
        """
        if front:
            values = values[..., front:].transpose(1, 2)
            return self.cut(values).transpose(1, 2)
        return values if self._shown is None else values[:, -self._shown :]

    def trim(self, output: Any, visible: int) -> None:
        """Cuts hidden states and attentions, where asked for, to the visible rows and their positions."""
        for key in ("hidden_states", "attentions"):
            values = [v for v in output.get(key) or () if v is not None]
            if values:
                n = visible // self.joint.visible if values[0].shape[0] == len(self.joint.mask) else 1
                front = self.joint.length - self.prompt_length if key == "attentions" else 0
                output[key] = tuple(self.cut(v[: visible // n], front).repeat_interleave(n, 0) for v in values)

    @staticmethod
    def rest(kwargs: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """The forward's keywords that a joint prompt does not replace."""
        known = (*REPLACED, *TOKEN_KEYS, *inputs)
        return {k: v for k, v in kwargs.items() if k not in known}

    @staticmethod
    def rows(kwargs: dict[str, Any]) -> int:
        """Rows of a forward's keywords."""
        entry: Any = kwargs.get("input_ids")
        return int((entry if entry is not None else kwargs["inputs_embeds"]).shape[0])
