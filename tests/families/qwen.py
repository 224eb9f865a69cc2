"""Qwen-VL and its kin: patches in one long row, a grid per picture, 3-D rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .core import DECODER, END, IMAGE, START, VIDEO, Draw, Family, Picture

IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GRIDS = [(1, 4, 4), (1, 4, 6), (1, 6, 6)]
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def patches(dim: int, framed: bool = True) -> Callable[[Draw], Picture]:
    """A picture as flattened patches; four of them make one token."""

    def picture(draw: Draw) -> Picture:
        grid = torch.tensor([draw.choose(GRIDS)])
        count = int(grid.prod())
        ids = [IMAGE] * (count // 4)
        tensors = {"pixel_values": draw.pixels(count, dim), "image_grid_thw": grid}
        return Picture([START, *ids, END] if framed else ids, tensors)

    return picture


QWEN2_VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 2,
    **PATCHES,
}
QWEN2_5_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "window_size": 16,
    "fullatt_block_indexes": [1],
    **PATCHES,
}
QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
    **PATCHES,
}
TEXT_MROPE = {**DECODER, "rope_parameters": MROPE}

FAMILIES = [
    Family(
        "qwen2_vl",
        {**IDS, "text_config": TEXT_MROPE, "vision_config": QWEN2_VISION},
        patches(96),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen2_5_vl",
        {**IDS, "text_config": TEXT_MROPE, "vision_config": QWEN2_5_VISION},
        patches(96),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen3_vl",
        {**IDS, "text_config": {**TEXT_MROPE, "head_dim": 16}, "vision_config": QWEN3_VISION},
        patches(96),
        types=("mm_token_type_ids",),
    ),
]
