"""Families that take pictures as flattened patches, padded or packed, without M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .core import (
    DECODER,
    END,
    IMAGE,
    ROW,
    START,
    TOWER,
    VIDEO,
    Draw,
    Family,
    Inputs,
    Picture,
    Prompt,
    concatenated,
    released,
)
from .qwen import QWEN3_5_TEXT

SIZES = [(4, 4), (4, 8), (8, 8)]
"""Height and width of a picture in patches."""


def minicpm(draw: Draw) -> Picture:
    """Sixteen patches a token; all patches of a batch lie side by side (5.17: pictures of one size)."""
    height, width = draw.choose(SIZES if released("5.23") else SIZES[:1])
    pixels = draw.pixels(4 * height * width, 3, 4)  # leading axis: columns of pixels
    sizes = torch.tensor([[height, width]], dtype=torch.int32)
    return Picture([START, *[IMAGE] * (height * width // 16), END], {"pixel_values": pixels, "target_sizes": sizes})


def packed(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """Columns of pixels of all pictures to [1, 3, patch, columns]."""
    tensors = concatenated(prompts, inputs)
    if tensors:
        tensors["pixel_values"] = tensors["pixel_values"].permute(1, 2, 0)[None]
    return tensors


def lfm2(draw: Draw) -> Picture:
    """Four patches a token; patches are padded to 64."""
    height, width = draw.choose(SIZES)
    count = height * width
    tensors = {
        "pixel_values": pad(draw.pixels(1, count, 48), (0, 0, 0, 64 - count)),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(64) < count).long()[None],
    }
    return Picture([START, *[IMAGE] * (count // 4), END], tensors)


def gemma4(draw: Draw) -> Picture:
    """Four patches a token; patches are padded to 64, their positions to -1."""
    height, width = draw.choose(SIZES)
    count = height * width
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], -1)
    tensors = {
        "pixel_values": pad(draw.pixels(1, count, 48), (0, 0, 0, 64 - count)),
        "image_position_ids": pad(places, (0, 0, 0, 64 - count), value=-1)[None],
    }
    return Picture([START, *[IMAGE] * (count // 4), END], tensors)


def fuyu(draw: Draw) -> Picture:
    """Four patches and a newline token after each row of two."""
    return Picture([IMAGE, IMAGE, ROW, IMAGE, IMAGE, ROW, START], {"pixel_values": draw.pixels(1, 4, 48)})


def molmo2(draw: Draw) -> Picture:
    """A low view of 2 x 2 tokens and a high view of 2 x 2, each with a token after every row."""
    low = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    pooling = torch.cat([low, low + 16])
    grid = [IMAGE, IMAGE, ROW, IMAGE, IMAGE, ROW]
    tensors = {
        "pixel_values": draw.pixels(2, 16, 48),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 2, 2]]),
        "image_num_crops": torch.tensor([2]),
    }
    return Picture([VIDEO, *grid, END, START, *grid, END], tensors)


def pooled(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """As `concatenated`; pooling indices count through all patches of the batch."""
    tensors = concatenated(prompts, inputs)
    if tensors:
        pictures = len(tensors["image_grids"])
        tensors["image_token_pooling"] += 32 * torch.arange(pictures).repeat_interleave(8)[:, None]
    return tensors


FAMILIES = [
    Family(
        "minicpmv4_6",
        {
            "text_config": {"model_type": "qwen3_5_text", **QWEN3_5_TEXT},
            "vision_config": {**TOWER, "image_size": 32, "patch_size": 4, "insert_layer_id": 0},
            "insert_layer_id": 0,
            "image_size": 32,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
        minicpm,
        join=packed,
    ),
    Family(
        "lfm2_vl",
        {
            "text_config": {
                "model_type": "lfm2",
                **DECODER,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
                "block_multiple_of": 32,
            },
            "vision_config": {"model_type": "siglip2_vision_model", **TOWER, "patch_size": 4, "num_patches": 64},
            "image_token_id": IMAGE,
            "projector_hidden_size": 64,
            "tie_word_embeddings": False,
        },
        lfm2,
    ),
    Family(
        "gemma4",
        {
            "text_config": {
                **DECODER,
                "head_dim": 16,
                "global_head_dim": 32,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 256,
            },
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "boi_token_id": START,
            "eoi_token_id": END,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 10,
            "boa_token_id": 11,
            "eoa_token_index": 12,
            "tie_word_embeddings": False,
        },
        gemma4,
        mask="window",
        types=("mm_token_type_ids",),
    ),
    Family(
        "fuyu",
        {
            "text_config": {"model_type": "persimmon", **{k: v for k, v in DECODER.items() if "key_value" not in k}},
            "image_size": 8,
            "patch_size": 4,
            "image_token_id": IMAGE,
        },
        fuyu,
        beams_until="5.23",
        grouped=False,
        min_transformers="5.23",
    ),
    Family(
        "molmo2",
        {
            "text_config": {**DECODER, "head_dim": 16, "additional_vocab_size": 8},
            "vision_config": {
                **TOWER,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "image_size": [16, 16],
                "num_position_embeddings": 16,
            },
            "adapter_config": {
                "vision_feature_layer": [-1],
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "intermediate_size": 48,
                "text_hidden_size": 64,
            },
            "image_start_token_id": START,
            "low_res_image_start_token_id": VIDEO,
            "image_end_token_id": END,
            "image_patch_id": IMAGE,
            "frame_start_token_id": 10,
            "frame_end_token_id": 11,
        },
        molmo2,
        join=pooled,
        mask="image-blocks",
        sees_ahead=True,
        types=("mm_token_type_ids",),
        min_transformers="5.23",
    ),
]
