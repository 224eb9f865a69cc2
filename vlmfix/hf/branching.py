"""Branches beneath model.forward: more rows per sample in the same forward, hidden from the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.families import FAMILIES, UNBRANCHED
from vlmfix.hf.inputs import PER_ROW, Prompt, by_row, change_pixels, changes_pixels, edit, gather
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
        per_row: whether picture inputs have a row on their first axis.
    """

    inputs: dict[str, Any]
    mask: Tensor
    positions: Tensor
    layout: Layout
    visible: int
    copies: int
    per_row: bool = False

    @property
    def length(self) -> int:
        """K of the joint prompt."""
        return self.mask.shape[1]


def join(parts: Parts, prompt: Prompt, views: Sequence[View], visible: bool = True, length: int = 0) -> Joint:
    """Builds the joint prompt of the visible rows and one branch per view.

    Args:
        parts: the model.
        prompt: the visible rows.
        views: one per branch.
        visible: whether the visible rows are part of it.
        length: least length to pad to.

    Raises:
        Refusal: the family cannot run branches, or a view changes pictures that came as embeddings.
    """
    if parts.family in UNBRANCHED:
        reason = FAMILIES[parts.family].branches.removeprefix("no: ")
        raise Refusal(f"{parts.family} cannot run branches: {reason}; use an attention method instead")
    for view in views:
        if prompt.embeds is not None and changes_pixels(view):
            raise Refusal(
                f"a prompt of inputs_embeds has no pixels that a branch ({type(view).__name__}) could change; pass "
                "input_ids and everything else the processor returned"
            )
    like, views = prompt.text, [*([View()] if visible else []), *views]
    edited = [edit(parts, prompt, view) for view in views]
    rows = [row for e in edited for row in e.ids]
    length = max(length, prompt.layout.length, *(len(row) for row in rows))
    ids, mask = _left_padded(rows, length, like), _left_padded([[1] * len(row) for row in rows], length, like)

    def gathered(values: Tensor, fill: int = 0) -> Tensor:
        return torch.cat([gather(values, e.source, length, fill) for e in edited])

    tokens = {k: gathered(v) for k, v in prompt.tokens.items() if k not in ("attention_mask", "position_ids")}
    images = gathered(prompt.layout.images, -1)
    visual = gathered(prompt.layout.visual.to(torch.uint8)).bool()
    layout = Layout(Layout.of(visual, mask).kinds, images, prompt.layout.mask)
    pictures = _concatenated([change_pixels(parts, prompt, view) for view in views])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **tokens, **pictures}
    if prompt.embeds is not None:
        source = _left_padded([row for e in edited for row in e.source], length, like, -1)
        inputs = {"inputs_embeds": _copied(parts, prompt.embeds, ids, source), "attention_mask": mask, **tokens}
    elif parts.embeds:
        inputs = {"inputs_embeds": _embed(parts, inputs), "attention_mask": mask}
    positions = positions_of(parts, ids, inputs)
    inputs["position_ids"] = positions
    return Joint(inputs, mask, positions, layout, prompt.layout.rows, len(views), parts.family in PER_ROW)


def _left_padded(rows: list[list[int]], length: int, like: Tensor, fill: int = 0) -> Tensor:
    padded = [[fill] * (length - len(row)) + row for row in rows]
    return torch.tensor(padded, dtype=like.dtype, device=like.device)


def _copied(parts: Parts, embeds: Tensor, ids: Tensor, source: Tensor) -> Tensor:
    """Embeddings of edited rows: those of the prompt where a position comes from it, else those of the ids.

    Args:
        parts: the model.
        embeds: [B, K, width] of the prompt.
        ids: [rows, K'] of the edited rows, one block of B rows after the other.
        source: [rows, K'] position in the prompt, -1 for none.
    """
    blocks = embeds.repeat(len(ids) // len(embeds), 1, 1)
    own = blocks.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[-1]))
    inserted = parts.model.get_input_embeddings()(ids).to(embeds.dtype)
    return torch.where((source >= 0)[..., None], own, inserted)


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


def positions_of(parts: Parts, entry: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Position ids of a prompt as `generate` would make them, rows last but one.

    Args:
        parts: the model.
        entry: [B, K] token ids, or [B, K, width] embeddings.
        inputs: everything else the forward gets, attention_mask among it.
    """
    prepare = getattr(parts.top, "_prepare_position_ids_for_generation", None)
    mask: Tensor = inputs["attention_mask"]
    if prepare is None or parts.embeds or entry.dim() == 3:
        return (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs = {k: v for k, v in inputs.items() if k != "input_ids"}
    with rope_kept(parts.model):
        return prepare(entry, kwargs)  # type: ignore[no-any-return]


@contextlib.contextmanager
def rope_kept(model: Any) -> Iterator[None]:
    """Models with 3-D rotary positions note in themselves how far a prompt's pictures moved them: restores the note."""
    owners: list[Any] = [m for m in (model, getattr(model, "model", None)) if hasattr(m, "rope_deltas")]
    notes = [owner.rope_deltas for owner in owners]
    try:
        yield
    finally:
        for owner, note in zip(owners, notes, strict=True):
            owner.rope_deltas = note


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


def repeat_pictures(joint: Joint, pictures: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Picture inputs for rows repeated in place (beams without a cache), each tensor cut by row first.

    Raises:
        Refusal: the inputs count through all pictures of the batch.
    """
    if "image_token_pooling" in pictures:
        raise Refusal("beams without a cache would mix up this family's pictures; set use_cache=True")
    out: dict[str, Any] = {}
    for key, value in pictures.items():
        rows = by_row(joint.layout, value, joint.per_row)
        out[key] = torch.cat([row for row in rows for _ in range(repeats)])
    return out
