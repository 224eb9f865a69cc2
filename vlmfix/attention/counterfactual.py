"""The prompt without its pictures beside the prefill, so that head rules can compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.attend import Tail
from vlmfix.hf.branching import positions_of
from vlmfix.hf.cache import drop_last
from vlmfix.hf.inputs import TOKEN_KEYS, Prompt, edit
from vlmfix.hf.parts import Parts
from vlmfix.layout import NEVER, Layout
from vlmfix.plan import Hidden, Plan
from vlmfix.view import View


class PackedText:
    """Copies of the text that follows the first picture, appended to the rows of one prefill and dropped after it.

    A copy sees the prompt up to its first picture and earlier copies, nothing else, and has the position it would
    have without pictures. In a causal decoder the shared part of the prompt never saw a picture either, so the copies
    are the prompt without pictures, exactly.

    Args:
        parts: the model.
        prompt: the visible rows.
        view: how a row reads without pictures; it may only leave tokens out.
    """

    def __init__(self, parts: Parts, prompt: Prompt, view: View) -> None:
        self.parts = parts
        self.length = prompt.layout.length
        first, copies = [], []
        valid = prompt.layout.valid.tolist()
        for row, source in enumerate(edit(parts, prompt, view).source):
            places = [i for i, ok in enumerate(valid[row]) if ok]
            shared = next((i for i, (a, b) in enumerate(zip(places, source, strict=False)) if a != b), len(source))
            first.append(places[shared] if shared < len(places) else self.length)
            copies.append(source[shared:])
        self.count = max(len(row) for row in copies)
        self.valid = prompt.layout.valid.long()
        device = prompt.layout.kinds.device
        self.first = torch.tensor(first, device=device)
        self.source = torch.tensor([[-1] * (self.count - len(row)) + row for row in copies], device=device)

    def before(self, kwargs: dict[str, Any], branches: bool) -> dict[str, Any]:
        """The prefill's keywords with copies appended.

        Args:
            kwargs: keywords of the forward.
            branches: whether branch rows, which get no copies, follow the visible rows; otherwise rows may be
                repeated in place.

        Raises:
            Refusal: the prompt comes in chunks.
        """
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        entry: Tensor = kwargs[name]
        self._fit(entry.shape[0], entry.shape[1], branches)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:  # nothing is padded, or it is ready-made for a static cache
            mask = self.valid.to(entry.device)
        positions = kwargs.get("position_ids")
        positions = (
            positions_of(self.parts, entry, {**kwargs, "attention_mask": mask}) if positions is None else positions
        )
        index = self.source.clamp(min=0)
        copies = entry.gather(1, index if name == "input_ids" else index[..., None].expand(-1, -1, entry.shape[-1]))
        out = {**kwargs, name: torch.cat([entry, copies], 1)}
        out["attention_mask"] = torch.cat([mask, (self.source >= 0).to(mask.dtype)], 1)
        out["position_ids"] = torch.cat([*self._positions(positions, mask)], -1)
        for key in TOKEN_KEYS:
            if key not in ("attention_mask", "position_ids") and isinstance(out.get(key), Tensor):
                out[key] = torch.nn.functional.pad(out[key], (0, self.count))
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, int) and keep:
            out["logits_to_keep"] = torch.arange(self.length - keep, self.length, device=entry.device)
        return out

    def after(self, output: Any) -> None:
        """Takes the copies off the logits, states and cache of the prefill."""
        output["logits"] = output.logits[:, : self.length]
        for key in ("hidden_states", "attentions"):
            if output.get(key):
                output[key] = tuple(None if x is None else x[..., : self.length, :] for x in output[key])
        cache = output.get("past_key_values")
        if cache is not None:
            drop_last(cache, self.count, self.length)

    @property
    def tail(self) -> Tail:
        """What the copies follow: they are blind to the prompt from its first picture on."""
        end = torch.full_like(self.first, self.length)
        none = torch.zeros(len(self.first), self.length, dtype=torch.uint8, device=self.first.device)
        plan = Plan(none, 1, torch.full_like(self.first, NEVER), hidden=(Hidden(end, self.first, end),))
        return Tail(self.length, (plan,))

    def pair(self, out: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The last prompt token of every row, and its copy: [B, Q, H, D] -> twice [B, H, D]."""
        return out[torch.arange(len(out), device=out.device), layout.last.to(out.device)], out[:, -1]

    def _fit(self, rows: int, length: int, branches: bool) -> None:
        """Sources and first hidden slots for the rows of this prefill."""
        if length < self.length:
            raise Refusal(
                "this method compares the whole prompt with and without its pictures; leave prefill_chunk_size unset "
                "and start from an empty cache"
            )
        shift, missing = length - self.length, rows - len(self.source)
        self.source = torch.where(self.source >= 0, self.source + shift, -1)
        self.first, self.length = self.first + shift, length
        if branches:
            self.source = torch.nn.functional.pad(self.source, (0, 0, 0, missing), value=-1)
            self.first = torch.nn.functional.pad(self.first, (0, missing), value=length)
        else:
            repeats = rows // len(self.source)
            self.source = self.source.repeat_interleave(repeats, 0)
            self.first = self.first.repeat_interleave(repeats, 0)
            self.valid = self.valid.repeat_interleave(repeats, 0)

    def _positions(self, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the prompt and of the copies, which go on from the shared part on all axes alike."""
        slots = torch.arange(self.length, device=mask.device)
        shared = torch.where(slots < self.first[:, None], mask, 0).sum(1)
        ahead = (shared[:, None] + (self.source >= 0).cumsum(1) - 1).clamp(min=0).to(positions.dtype)
        own = positions.expand(*positions.shape[:-2], len(self.source), self.length)
        return own, ahead.expand(*positions.shape[:-2], *ahead.shape)


@dataclass(frozen=True)
class TextRows:
    """Rows without pictures behind all others in one prefill, dropped after it: for any family that can branch.

    Args:
        visible: number of visible rows.
        rows: number of all rows, the last `visible` of them without pictures.
    """

    visible: int
    rows: int

    @property
    def partner(self) -> Tensor:
        """[rows] the row whose head scales a row follows: rows without pictures follow those they were made from."""
        own = torch.arange(self.rows)
        start = self.rows - self.visible
        return torch.where(own >= start, own - start, own)

    def pair(self, out: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """The last prompt token of every row, and that of its row without pictures: [B, Q, H, D] -> twice [B, H, D]."""
        skipped = layout.length - out.shape[1]  # some decoders run only the last token through their upper layers
        last = out[torch.arange(len(out), device=out.device), layout.last.to(out.device) - skipped]
        partner = self.partner.to(out.device)
        without = torch.where(partner < self.visible, partner + self.rows - self.visible, partner)
        return last[partner], last[without]
