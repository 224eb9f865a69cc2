"""From what a processor returned to a layout, and to a prompt that can be edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.parts import Parts
from vlmfix.hf.whole import change_whole
from vlmfix.layout import Layout, MaskKind
from vlmfix.view import RowText, View

TOKEN_KEYS = ("attention_mask", "token_type_ids", "mm_token_type_ids", "image_embeds_position_mask", "position_ids")
"""Inputs with one entry per prompt token."""

NOT_PICTURES = ("bos_token_id", "eos_token_id", "pad_token_id", "negative_prompt_ids", "negative_prompt_attention_mask")


PER_ROW = ("idefics2", "idefics3", "smolvlm")
"""Families whose picture inputs have a row of the batch on the first axis; elsewhere it counts pictures or patches."""


@dataclass(frozen=True)
class Prompt:
    """The caller's model inputs, sorted.

    Args:
        ids: [B, K] token ids; absent for a prompt of embeddings.
        embeds: [B, K, width] embeddings; absent for a prompt of ids.
        tokens: per-token inputs [B, K], the attention mask among them.
        pictures: everything else the processor returned (pixels, grids, sizes, masks, Q-Former text).
        layout: what stands where.
    """

    ids: Tensor | None
    embeds: Tensor | None
    tokens: dict[str, Tensor]
    pictures: dict[str, Any]
    layout: Layout

    @property
    def text(self) -> Tensor:
        """[B, K] token ids; zeros where embeddings hide them."""
        return torch.zeros_like(self.layout.kinds, dtype=torch.long) if self.ids is None else self.ids


def read(
    parts: Parts, inputs: Mapping[str, Any], visual_mask: Tensor | None = None, global_tile: int | None = None
) -> Prompt:
    """Sorts model inputs and finds the layout.

    Args:
        parts: the model.
        inputs: keywords of `generate` or `forward`; generation settings are ignored.
        visual_mask: [B, K] bool visual positions; required with `inputs_embeds`, where the ids are lost.
        global_tile: id of the token before a picture's last tile, where a family has one.

    Raises:
        UsageError: no ids and no mask, or an input that the family needs is missing.
    """
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is None and embeds is None:
        raise UsageError("neither input_ids nor inputs_embeds was given; pass everything the processor returned")
    shape = ids.shape[:2] if ids is not None else embeds.shape[:2]  # type: ignore[union-attr]
    tokens = {k: v for k in TOKEN_KEYS if isinstance(v := inputs.get(k), Tensor) and v.shape[-2:] == shape}
    pictures = {k: v for k, v in inputs.items() if _is_picture(k, v) and k not in tokens}
    if visual_mask is None:
        visual_mask = _visual(parts, ids, inputs)
    family = FAMILIES.get(parts.family)
    missing = "" if family is None else family.types
    if missing and ids is not None and missing not in tokens and bool(visual_mask.any()):
        raise UsageError(
            f"{parts.family} reads a prompt with pictures as plain text when {missing} is missing; pass "
            "everything the processor "
            f"returned (ask it with return_mm_token_type_ids=True)"
        )
    valid = tokens.get("attention_mask")
    images = _image_index(parts, ids, visual_mask, pictures, global_tile)
    layout = Layout.of(visual_mask, valid, images, mask_kind(parts.family))
    return Prompt(ids, embeds, tokens, pictures, layout)


def mask_kind(family: str) -> MaskKind:
    """How prompt rows of a family see each other; causal for families not in the table."""
    row = FAMILIES.get(family)
    return MaskKind.CAUSAL if row is None else MaskKind(row.mask)


def _is_picture(key: str, value: Any) -> bool:
    if key in TOKEN_KEYS or key in NOT_PICTURES or key in ("input_ids", "inputs_embeds", "visual_mask", "labels"):
        return False
    return isinstance(value, Tensor) or _is_list_of_tensors(value) or key == "mm_encoder_outputs"


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


def _visual(parts: Parts, ids: Tensor | None, inputs: Mapping[str, Any]) -> Tensor:
    if isinstance(mask := inputs.get("image_embeds_position_mask"), Tensor):
        return mask.bool()
    if ids is None:
        raise UsageError("inputs_embeds hide where the pictures are; give visual_mask=[B, K] bool as well")
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in parts.image_ids:
        found |= ids == token
    return found


def _image_index(
    parts: Parts, ids: Tensor | None, visual: Tensor, pictures: Mapping[str, Any], global_tile: int | None
) -> Tensor | None:
    """[B, K] picture of each visual token; None where one contiguous run is one picture."""
    counts = _tokens_per_picture(parts, pictures)
    if counts is not None and int(counts.sum()) == int(visual.sum()):
        index = torch.full(visual.shape, -1, dtype=torch.long, device=visual.device)
        index[visual] = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu()).to(visual.device)
        first = torch.where(visual, index, 2**20).amin(1, keepdim=True)
        return index - first
    if global_tile is not None and ids is not None:
        before = torch.nn.functional.pad(ids == global_tile, (1, 0))[:, :-1]
        closed = (before & visual).cumsum(1)  # runs that end a picture, up to and including this one
        ends_here = _run_has(visual, before & visual)
        return torch.where(ends_here, closed - 1, closed)
    return None


def _run_has(visual: Tensor, mark: Tensor) -> Tensor:
    """[B, K] True on the whole contiguous run whose first token is marked."""
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    run = starts.cumsum(1)
    marked = torch.zeros(
        visual.shape[0], int(run.max()) + 1 if visual.numel() else 1, dtype=torch.bool, device=visual.device
    )
    rows, cols = mark.nonzero(as_tuple=True)
    marked[rows, run[rows, cols]] = True
    return visual & marked.gather(1, run)


def _tokens_per_picture(parts: Parts, pictures: Mapping[str, Any]) -> Tensor | None:
    vision: Any = getattr(parts.model.config, "vision_config", None)
    grid = pictures.get("image_grid_thw")
    if isinstance(grid, Tensor):
        merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
        return grid.prod(-1) // merge**2
    sizes = pictures.get("image_sizes")
    merge = getattr(parts.model.config, "spatial_merge_size", None)
    if isinstance(sizes, Tensor) and isinstance(merge, int):
        tokens: Tensor = (sizes // (vision.patch_size * merge)).prod(-1)
        return tokens
    return None


@dataclass(frozen=True)
class Edited:
    """A branch's prompt: rows of ids with the position each came from (-1 for inserted ones)."""

    ids: list[list[int]]
    source: list[list[int]]


def edit(parts: Parts, prompt: Prompt, view: View) -> Edited:
    """Applies a view to the text of every row."""
    structure = set(parts.structure_ids)
    rows: Edited = Edited([], [])
    for ids, kinds, valid in zip(
        prompt.text.tolist(), prompt.layout.kinds.tolist(), prompt.layout.valid.tolist(), strict=True
    ):
        places = [i for i, ok in enumerate(valid) if ok]
        row = RowText([ids[i] for i in places], [kinds[i] for i in places], [ids[i] in structure for i in places])
        steps = view.text(row)
        rows.ids.append([step[0] if isinstance(step, tuple) else row.ids[step] for step in steps])
        rows.source.append([-1 if isinstance(step, tuple) else places[step] for step in steps])
    return rows


def gather(values: Tensor, source: list[list[int]], length: int, fill: int = 0) -> Tensor:
    """Per-token values of edited rows, left-padded: [B, K] -> [B, length]; inserted tokens get `fill`."""
    out = values.new_full((len(source), length), fill)
    for i, row in enumerate(source):
        if row:
            index = torch.tensor(row, device=values.device)
            picked = torch.where(index >= 0, values[i, index.clamp(min=0)], fill)
            out[i, length - len(row) :] = picked
    return out


def change_pixels(parts: Parts, prompt: Prompt, view: View) -> dict[str, Any]:
    """The prompt's picture inputs with every picture's pixels changed by the view."""
    if not view.keeps_pictures():
        return {}
    pictures = dict(prompt.pictures)
    if "mm_encoder_outputs" in pictures and changes_pixels(view):
        raise Refusal(
            "pictures were encoded before generate (mm_encoder_outputs); pass the processor's pixel_values instead"
        )
    if type(view).picture is not View.picture and bool(prompt.layout.visual.any()):
        pictures["pixel_values"] = change_whole(parts, view, pictures, prompt.layout, prompt.text)
    if type(view).pixels is View.pixels:
        return pictures
    for key in ("pixel_values", "image_patches"):
        pixels = pictures.get(key)
        if isinstance(pixels, Tensor):
            pixels = pixels.clone()
            for piece, index in pieces(prompt.layout, pixels, parts.family in PER_ROW):
                piece.copy_(_per_tile(parts, view, piece, index))
            pictures[key] = pixels
        elif _is_list_of_tensors(pixels):
            raise Refusal(f"{parts.family}: pictures come as a list of tensors, which views cannot change yet")
    return pictures


def changes_pixels(view: View) -> bool:
    """Whether a view changes what pictures look like."""
    return type(view).pixels is not View.pixels or type(view).picture is not View.picture


def _per_tile(parts: Parts, view: View, piece: Tensor, index: int) -> Tensor:
    """One picture through a view: tiles of zeros are padding and stay; patches of a still repeat one frame."""
    if piece.dim() == 2:
        vision = parts.model.config.vision_config
        frames = getattr(vision, "temporal_patch_size", 1)
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
        patches = piece.view(piece.shape[0], channels, frames, -1)
        return view.pixels(patches[:, :, 0], index)[:, :, None].expand_as(patches).reshape(piece.shape)
    real = piece.flatten(1).any(1)
    out = piece.clone()
    if real.any():
        out[real] = view.pixels(piece[real], index)
    return out


def pieces(layout: Layout, pixels: Tensor, per_row: bool) -> Iterator[tuple[Tensor, int]]:
    """Views of a pixel tensor, one per picture, [tiles or patches, ...], with the picture's index within its row.

    The first axis counts pictures, or tiles and patches of all pictures in order; which one follows from its length.
    Where tiles cannot be told apart by picture, a row's pictures come as one piece.

    Args:
        layout: the prompt.
        pixels: the tensor.
        per_row: whether its first axis counts rows.

    Raises:
        Refusal: the axis fits none of these.
    """
    numbers = layout.n_images.tolist()
    order = [i for n in numbers for i in range(n)]
    packed = pixels.dim() == 4 and pixels.shape[0] == 1 and len(order) > 1  # patches of all pictures side by side
    axis = 3 if packed else 0
    if per_row:
        sizes: list[int] | None = [1] * layout.rows
        indices = [0] * layout.rows
    else:
        pictures = [int((layout.images[b] == i).sum()) for b, n in enumerate(numbers) for i in range(n)]
        rows = [n for n in layout.n_visual.tolist() if n]
        sizes, indices = _shares(pixels.shape[axis], pictures), order
        if sizes is None:
            sizes, indices = _shares(pixels.shape[axis], rows), [0] * len(rows)
        if sizes is None:
            raise Refusal(
                f"pixels of shape {tuple(pixels.shape)} do not divide over pictures of {pictures} visual tokens"
            )
    assert sizes is not None
    for piece, index in zip(torch.split(pixels, sizes, axis), indices, strict=True):
        yield (piece[0], index) if pixels.dim() == 5 and len(piece) == 1 else (piece, index)


def by_row(layout: Layout, values: Tensor, per_row: bool) -> list[Tensor]:
    """A picture input cut along its first axis into one part per row with pictures.

    Args:
        layout: the prompt.
        values: the input.
        per_row: whether its first axis counts rows; then rows without pictures have a part too.

    Raises:
        Refusal: the axis counts neither pictures nor anything in proportion to visual tokens.
    """
    if per_row:
        return list(torch.split(values, 1))
    tokens = [
        [int((layout.images[b] == i).sum()) for i in range(n)] for b, n in enumerate(layout.n_images.tolist()) if n
    ]
    sizes = _shares(values.shape[0], [n for row in tokens for n in row])
    if sizes is not None:
        counts, rest = [len(row) for row in tokens], iter(sizes)
        sizes = [sum(next(rest) for _ in range(n)) for n in counts]
    else:
        sizes = _shares(values.shape[0], [sum(row) for row in tokens])
    if sizes is None:
        raise Refusal(f"picture input of shape {tuple(values.shape)} cannot be cut by row; set use_cache=True")
    return list(torch.split(values, sizes))


def _shares(total: int, tokens: list[int]) -> list[int] | None:
    """`total` divided one each, or in proportion to token counts; None where neither fits."""
    if total == len(tokens):
        return [1] * total
    if not tokens or any(total * n % sum(tokens) for n in tokens):
        return None
    return [total * n // sum(tokens) for n in tokens]
