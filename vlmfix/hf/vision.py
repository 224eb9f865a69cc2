"""The class token of a vision tower: where it looks, read off while the tower runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.errors import Refusal
from vlmfix.layout import Layout

PACKED = ("llava_next", "llava_next_video")
"""Families that lay the patches of tiles out as one grid, with a token after each row."""

PLAIN = ("llava", "vipllava")
"""Families whose visual tokens are the tower's patches in order."""


def class_tower(model: nn.Module) -> dict[int, nn.Module]:
    """Attention modules by layer of a vision tower with a class token whose patches are visual tokens; else empty."""
    config: Any = model.config
    if config.model_type not in (*PLAIN, *PACKED) or getattr(config, "vision_feature_select_strategy", "") == "full":
        return {}
    tower = next((m for name, m in model.named_modules() if name.endswith("vision_tower")), None)
    if tower is None or not any(name.endswith("class_embedding") for name, _ in tower.named_parameters()):
        return {}
    found = (m for m in tower.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj") and hasattr(m, "num_heads"))
    return dict(enumerate(found))


def class_row(attention: Any, hidden: Tensor) -> Tensor:
    """What the class token pays to the patches, summed over heads: one query row, no attention matrix.

    Args:
        attention: an attention module with q_proj, k_proj, num_heads.
        hidden: [tiles, 1 + N, width] its input, class token first.

    Returns:
        [tiles, N] float32.
    """
    split = (attention.num_heads, -1)
    query = attention.q_proj(hidden[:, :1]).unflatten(-1, split).float()
    key = attention.k_proj(hidden).unflatten(-1, split).float()
    scores = torch.einsum("tqhd,tkhd->thk", query, key) * query.shape[-1] ** -0.5
    row: Tensor = scores.softmax(-1)[..., 1:].sum(1)
    return row


def on_tokens(model: Any, layout: Layout, rows: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Values of patches at the visual tokens of a prompt.

    Args:
        model: the model.
        layout: the prompt.
        rows: [tiles, N] a value per patch, for all pictures in order.
        inputs: what the processor returned; families with tiles need image_sizes.

    Returns:
        [B, K] float32; nan at tokens that are no patch, and outside pictures.

    Raises:
        Refusal: the patches do not cover the visual tokens.
    """
    areas = inputs.get("image_sizes")
    values = _packed(model, rows, areas) if model.config.model_type in PACKED and areas is not None else rows.flatten()
    wanted = int(layout.n_visual.sum())
    repeats = len(values) // wanted if wanted and len(values) % wanted == 0 else 1
    if repeats > 1:  # every picture repeated in place for beams, before the prompt was
        index = zip(layout.images.tolist(), layout.n_images.tolist(), strict=True)
        sizes = [images.count(i) for images, pictures in index for i in range(pictures) for _ in range(repeats)]
        values = torch.cat(torch.split(values, sizes)[::repeats])
    if len(values) != wanted:
        raise Refusal(
            f"the vision tower has {len(values)} patches for {wanted} visual tokens, so they cannot be matched"
        )
    out = torch.full(layout.kinds.shape, float("nan"), device=rows.device)
    out[layout.visual] = values
    return out


def _packed(model: Any, rows: Tensor, sizes: Tensor) -> Tensor:
    """Patches in the order in which the model lays them out as tokens, nan for its row ends."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes
    ]
    repeats = len(rows) // sum(tiles) if sum(tiles) else 1  # older releases repeat pictures for beams before the tower
    sizes = sizes.repeat_interleave(repeats, 0)
    pictures = torch.split(rows[..., None], [count for count in tiles for _ in range(repeats)])
    newline = torch.full((1,), float("nan"), device=rows.device)
    packed, _ = model.pack_image_features(pictures, sizes, config.vision_feature_select_strategy, newline)
    return torch.cat([part.flatten() for part in packed])
