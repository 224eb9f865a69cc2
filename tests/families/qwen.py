"""Qwen-VL and its kin: patches in one long row, a grid per picture, 3-D rotary positions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .core import DECODER, END, IMAGE, SEP, START, TOWER, VIDEO, Draw, Family, Picture

IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GRIDS = [(1, 4, 4), (1, 4, 6), (1, 6, 6)]
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}


def patches(frames: int, framed: bool = True) -> Callable[[Draw], Picture]:
    """A still picture as flattened patches of [channels, frames, 4, 4]; four patches make one token."""

    def picture(draw: Draw) -> Picture:
        grid = torch.tensor([draw.choose(GRIDS)])
        count = int(grid.prod())
        ids = [IMAGE] * (count // 4)
        pixels = draw.pixels(count, 3, 1, 16).expand(-1, -1, frames, -1).reshape(count, -1)
        tensors = {"pixel_values": pixels, "image_grid_thw": grid}
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

HALF_ROTARY = {"partial_rotary_factor": 0.5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
QWEN3_5_TEXT = {
    **DECODER,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "rms_norm_eps": 1e-3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], **HALF_ROTARY},
}
QWEN3_5_VISION = {name: value for name, value in QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": SEP,
    "video_end_token_id": SEP + 1,
}


def video_llama_3(draw: Draw) -> Picture:
    """Flattened patches, merged 2 x 2 as said beside them; plain positions and no frame."""
    picture = patches(1, framed=False)(draw)
    return Picture(picture.ids, {**picture.tensors, "image_merge_sizes": torch.tensor([2])})


FAMILIES = [
    Family(
        "qwen2_vl",
        {**IDS, "text_config": TEXT_MROPE, "vision_config": QWEN2_VISION},
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen2_5_vl",
        {**IDS, "text_config": TEXT_MROPE, "vision_config": QWEN2_5_VISION},
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen3_vl",
        {**IDS, "text_config": {**TEXT_MROPE, "head_dim": 16}, "vision_config": QWEN3_VISION},
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen3_vl_moe",
        {
            **IDS,
            "text_config": {**TEXT_MROPE, "head_dim": 16, **EXPERTS},
            "vision_config": QWEN3_VISION,
        },
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "qwen3_5",
        {**IDS, "text_config": QWEN3_5_TEXT, "vision_config": QWEN3_5_VISION},
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "glm4v",
        {
            **GLM_IDS,
            "text_config": {**DECODER, "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], **HALF_ROTARY}},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "image_size": 24,
                "out_hidden_size": 64,
                **PATCHES,
            },
        },
        patches(2),
        types=("mm_token_type_ids",),
    ),
    Family(
        "video_llama_3",
        {
            "text_config": {"model_type": "qwen2", **DECODER},
            "vision_config": {**TOWER, "patch_size": 4},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        video_llama_3,
    ),
]
