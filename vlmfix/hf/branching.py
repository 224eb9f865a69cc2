"""Branches beneath model.forward: more rows per sample in the same forward, hidden from the caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.inputs import Prompt, by_row, change_pixels, edit, gather
from vlmfix.hf.parts import Parts
from vlmfix.layout import Layout
from vlmfix.view import View

REPLACED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "mm_encoder_outputs", "cache_position")


@dataclass(frozen=True)
class Joint:
    """A prompt of visible rows followed by the rows of each branch, left-padded to one length.

    Args:
        inputs: keywords of the first forward.
        mask: [rows, K] attention mask.
        positions: position ids of the first forward, rows last but one.
        layout: of all rows.
        visible: number of visible rows.
        copies: 1 + number of branches.
    """

    inputs: dict[str, Any]
    mask: Tensor
    positions: Tensor
    layout: Layout
    visible: int
    copies: int

    @property
    def length(self) -> int:
        """K of the joint prompt."""
        return self.mask.shape[1]


def join(parts: Parts, prompt: Prompt, views: Sequence[View]) -> Joint:
    """Builds the joint prompt of the visible rows and one branch per view.

    Raises:
        Refusal: the family cannot run branches, or the prompt consists of embeddings alone.
    """
    if parts.family in UNBRANCHED:
        raise Refusal(f"{parts.family}: {UNBRANCHED[parts.family]}; use an attention method instead")
    if prompt.ids is None:
        raise Refusal(
            "a prompt of inputs_embeds has no text a branch could be made from; pass input_ids and the "
            "processor's inputs"
        )
    edited = [edit(parts, prompt, view) for view in views]
    rows = [[i for i, ok in enumerate(valid) if ok] for valid in prompt.layout.valid.tolist()]
    sources = [rows, *(e.source for e in edited)]
    length = max(prompt.layout.length, max(len(row) for block in sources for row in block))
    ids = torch.cat([_padded(prompt.ids, length), *(_rows(e.ids, length, prompt.ids) for e in edited)])
    mask = torch.cat(
        [_padded(prompt.layout.valid.long(), length), *(_valid(e.ids, length, prompt.ids) for e in edited)]
    )
    tokens = {
        key: torch.cat([_padded(value, length), *(gather(value, e.source, length) for e in edited)])
        for key, value in prompt.tokens.items()
        if key not in ("attention_mask", "position_ids")
    }
    kinds = torch.cat(
        [_padded(prompt.layout.kinds, length), *(_branch_kinds(prompt, e.source, length) for e in edited)]
    )
    images = torch.cat(
        [
            _padded(prompt.layout.images, length, -1),
            *(gather(prompt.layout.images, e.source, length, -1) for e in edited),
        ]
    )
    layout = Layout(kinds, images, prompt.layout.mask)
    pictures = _concatenated([prompt.pictures, *(change_pixels(parts, prompt, view) for view in views)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **tokens, **pictures}
    if parts.embeds:
        inputs = {"inputs_embeds": _embed(parts, inputs), "attention_mask": mask}
    positions = _positions(parts, ids, inputs)
    return Joint({**inputs, "position_ids": positions}, mask, positions, layout, prompt.layout.rows, 1 + len(views))


UNBRANCHED = {
    "kosmos-2": "its own generate neither passes keywords nor pads rows equally, so branches cannot ride in "
    "the same forward",
    "mllama": "its cross-attention ties every row to a picture, so branches cannot ride in the same forward",
}


def _padded(values: Tensor, length: int, fill: int = 0) -> Tensor:
    return torch.nn.functional.pad(values, (length - values.shape[1], 0), value=fill)


def _rows(rows: list[list[int]], length: int, like: Tensor) -> Tensor:
    return torch.stack(
        [torch.tensor([0] * (length - len(row)) + row, dtype=like.dtype, device=like.device) for row in rows]
    )


def _valid(rows: list[list[int]], length: int, like: Tensor) -> Tensor:
    return torch.stack([torch.tensor([0] * (length - len(row)) + [1] * len(row), device=like.device) for row in rows])


def _branch_kinds(prompt: Prompt, source: list[list[int]], length: int) -> Tensor:
    visual = gather(prompt.layout.visual.to(torch.uint8), source, length).bool()
    valid = torch.stack([torch.arange(length) >= length - len(row) for row in source]).to(visual.device)
    return Layout.of(visual, valid).kinds


def _concatenated(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Picture inputs of all blocks, one vision pass for all; blocks without pictures add nothing."""
    blocks = [block for block in blocks if block]
    out: dict[str, Any] = {}
    for key in blocks[0] if blocks else ():
        values = [block[key] for block in blocks]
        if key == "image_token_pooling":  # indices into the patches of the whole batch
            patches = blocks[0]["pixel_values"].shape[:2].numel()
            values = [value + i * patches for i, value in enumerate(values)]
        packed = key == "pixel_values" and values[0].shape[0] == 1 and "target_sizes" in blocks[0]
        out[key] = torch.cat(values, -1 if packed else 0)
    return out


def _positions(parts: Parts, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    prepare = getattr(parts.top, "_prepare_position_ids_for_generation", None)
    mask: Tensor = inputs["attention_mask"]
    if prepare is None or parts.embeds:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs = {k: v for k, v in inputs.items() if k != "input_ids"}
    return prepare(ids, kwargs)  # type: ignore[no-any-return]


def _embed(parts: Parts, inputs: dict[str, Any]) -> Tensor:
    """Embeddings with visual features at their placeholders, for families whose `generate` hands embeddings on."""
    model: Any = parts.model
    ids = inputs["input_ids"]
    embeds: Tensor = model.get_input_embeddings()(ids)
    pictures = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "token_type_ids")}
    if "pixel_values" in pictures:
        features = model.get_image_features(**pictures, return_dict=True).pooler_output
        features = torch.cat(list(features)) if not isinstance(features, Tensor) else features
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for token in parts.image_ids:
            visual |= ids == token
        embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype).flatten())
    return embeds


def repeat_pictures(layout: Layout, pictures: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Picture inputs for rows repeated in place (beams without a cache), each tensor cut by row first."""
    out: dict[str, Any] = {}
    for key, value in pictures.items():
        rows = by_row(layout, value)
        out[key] = torch.cat([row for row in rows for _ in range(repeats)])
    return out
