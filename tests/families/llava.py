"""Families with one run of placeholders per picture and a CLIP-like tower."""

from __future__ import annotations

import torch

from .core import DECODER, IMAGE, TOWER, VIDEO, Draw, Family, Picture, merged, padded_tiles

CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 12, "patch_size": 4, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "image_size": 8, "patch_size": 4, "vision_use_head": False}
LLAMA = {"model_type": "llama", **DECODER}
QWEN2 = {"model_type": "qwen2", **DECODER}


def single(tokens: int, size: int):
    """One square picture, a fixed number of tokens."""

    def picture(draw: Draw) -> Picture:
        return Picture([IMAGE] * tokens, {"pixel_values": draw.pixels(1, 3, size, size)})

    return picture


def anyres_next(draw: Draw) -> Picture:
    """Base view and tiles of 8 pixels (2 x 2 patches); each row of patches ends with a newline embedding."""
    height, width = draw.choose([(8, 16), (16, 8), (16, 16)])
    rows, columns = height // 4, width // 4
    tiles = 1 + height * width // 64
    tensors = {"pixel_values": draw.pixels(1, tiles, 3, 8, 8), "image_sizes": torch.tensor([[height, width]])}
    return Picture([IMAGE] * (4 + rows * (columns + 1)), tensors)


def anyres_onevision(draw: Draw) -> Picture:
    """As `anyres_next` for a lone picture; pictures with siblings keep the base view and one newline."""
    picture = anyres_next(draw)
    tensors = {
        **picture.tensors,
        "batch_num_images": torch.tensor([draw.siblings] * (draw.index == 0), dtype=torch.long),
    }
    if draw.siblings == 1:
        return Picture(picture.ids, tensors)
    return Picture([IMAGE] * 5, {**tensors, "pixel_values": tensors["pixel_values"][:, :1]})


NEXT = {
    "text_config": LLAMA,
    "vision_config": merged(CLIP, {"image_size": 8}),
    "image_token_index": IMAGE,
    "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]],
}

FAMILIES = [
    Family(
        "llava",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": 9},
        single(9, 12),
    ),
    Family(
        "llava_next",
        NEXT,
        anyres_next,
        join=padded_tiles,
    ),
    Family(
        "llava_onevision",
        {
            "text_config": QWEN2,
            "vision_config": SIGLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]],
        },
        anyres_onevision,
        join=padded_tiles,
    ),
    Family(
        "vipllava",
        {
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "image_seq_length": 9,
            "vision_feature_layers": [-2, -1],
        },
        single(9, 12),
    ),
    Family(
        "llava_next_video",
        {**NEXT, "video_token_index": VIDEO},
        anyres_next,
        join=padded_tiles,
    ),
    Family(
        "deepseek_vl",
        {
            "text_config": LLAMA,
            "vision_config": {**SIGLIP, "image_size": 12},
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        single(9, 12),
    ),
    Family(
        "janus",
        {
            "text_config": LLAMA,
            "vision_config": {
                **TOWER,
                "image_size": 12,
                "patch_size": 4,
                "mlp_ratio": 1.5,
                "projection_dim": 64,
                "num_image_tokens": 9,
            },
            "vq_config": {
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 3,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        single(9, 12),
    ),
]
