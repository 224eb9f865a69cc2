"""Pictures put together from what a family's processor made of them, changed as a whole, and cut up again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.parts import Parts
from vlmfix.layout import Kind, Layout
from vlmfix.view import Picture, View


def change_whole(parts: Parts, view: View, pictures: Mapping[str, Any], layout: Layout, ids: Tensor) -> Tensor:
    """All pictures of a batch, each through `View.picture`.

    Args:
        parts: the model.
        view: the view.
        pictures: the prompt's picture inputs.
        layout: the prompt.
        ids: [B, K] token ids of the prompt.

    Returns:
        The changed `pixel_values`.

    Raises:
        Refusal: the family cuts pictures up in a way that cannot be undone here.
    """
    pixels, grid, sizes = (pictures.get(key) for key in ("pixel_values", "image_grid_thw", "image_sizes"))
    pixels = pixels if isinstance(pixels, Tensor) else torch.empty(0)
    places = [(row, i) for row, n in enumerate(layout.n_images.tolist()) for i in range(n)]
    if isinstance(grid, Tensor) and pixels.dim() == 2:
        counts = grid.prod(-1).tolist()
        return torch.cat(
            [
                _patches(parts, view, piece, size, _place(parts, layout, ids, *place))
                for piece, size, place in zip(torch.split(pixels, counts), grid.tolist(), places, strict=True)
            ]
        )
    stack = pixels[:, 0] if pixels.dim() == 5 and pixels.shape[1] == 1 else pixels
    family = FAMILIES.get(parts.family)
    cut = "target_sizes" in pictures or (family is not None and family.tiled)
    if cut or stack.dim() != 4 or len(stack) != len(places):
        raise Refusal(
            f"{parts.family}: {type(view).__name__} changes a picture as a whole, and this family's processor made "
            f"pixels of shape {tuple(pixels.shape)} of {len(places)} picture(s): tiles or patches that cannot be put "
            "together here; use vcd, m3id or an attention method instead"
        )
    changed = stack.clone()
    for i, (picture, place) in enumerate(zip(stack, places, strict=True)):
        height, width = sizes[i].tolist() if isinstance(sizes, Tensor) else picture.shape[-2:]
        part = picture[:, :height, :width]  # what lies beyond pads it to the largest picture of the batch
        changed[i, :, :height, :width] = view.picture(part, _place(parts, layout, ids, *place)).to(pixels)
    return changed.view(pixels.shape)


def _place(parts: Parts, layout: Layout, ids: Tensor, row: int, index: int) -> Picture:
    last = int(layout.after_visual[row])
    framing = {*parts.structure_ids, *parts.image_ids}
    behind = [token for token in ids[row, last:].tolist() if token not in framing]
    before = [
        token
        for token, kind in zip(ids[row].tolist(), layout.kinds[row].tolist(), strict=True)
        if kind == Kind.SYSTEM and token not in framing
    ]
    return Picture(row, index, tuple(before), tuple(behind))


def _patches(parts: Parts, view: View, patches: Tensor, grid: list[int], place: Picture) -> Tensor:
    """Patches [n, channels x frames x area] in blocks that are merged later, as Qwen2-VL's processor orders them."""
    vision: Any = parts.model.config.vision_config
    merge = getattr(vision, "spatial_merge_size", None)
    time, height, width = grid
    if merge is None or time != 1:
        raise Refusal(f"{parts.family}: the order of its patches is not known, so a picture cannot be put together")
    frames, side = vision.temporal_patch_size, vision.patch_size
    blocks = (height // merge, width // merge, merge, merge, -1, frames, side, side)
    stack = patches.view(blocks)
    picture = stack[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, height * side, width * side)
    changed = view.picture(picture, place).to(patches)
    cut = changed.view(-1, blocks[0], merge, side, blocks[1], merge, side).permute(1, 4, 2, 5, 0, 3, 6)
    return cut[:, :, :, :, :, None].expand(stack.shape).reshape(patches.shape)
