"""Families that cut a picture into tiles: one run of placeholders per tile, or tiles inside one run."""

from __future__ import annotations

import torch

from .core import DECODER, END, GLOBAL, IMAGE, ROW, START, TOWER, Draw, Family, Picture, per_row

LLAMA = {"model_type": "llama", **DECODER}
QWEN2 = {"model_type": "qwen2", **DECODER}


def idefics3(draw: Draw) -> Picture:
    """A global view, alone or after a row of two tiles; 16 pixels, 4 x 4 patches, 4 tokens a tile."""
    tiles = draw.choose([1, 3])
    cut = [token for _ in range(tiles - 1) for token in (START, ROW, *[IMAGE] * 4)]
    tensors = {
        "pixel_values": draw.pixels(tiles, 3, 16, 16),
        "pixel_attention_mask": torch.ones(tiles, 16, 16, dtype=torch.long),
    }
    return Picture([*cut, START, GLOBAL, *[IMAGE] * 4, START], tensors)


def internvl(draw: Draw) -> Picture:
    """One to three tiles of 4 tokens inside one frame."""
    tiles = draw.choose([1, 3])
    return Picture([START, *[IMAGE] * 4 * tiles, END], {"pixel_values": draw.pixels(tiles, 3, 16, 16)})


IDEFICS3 = {
    "text_config": LLAMA,
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}

FAMILIES = [
    Family(
        "internvl",
        {
            "text_config": QWEN2,
            "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        internvl,
    ),
    Family("idefics3", IDEFICS3, idefics3, join=per_row),
    Family("smolvlm", IDEFICS3, idefics3, join=per_row),
]
