"""Families whose prompt or pictures see themselves in both directions."""

from __future__ import annotations

from .core import DECODER, END, IMAGE, START, Draw, Family, Picture
from .llava import SIGLIP, single


def gemma3(draw: Draw) -> Picture:
    """Four pooled tokens between begin and end of image."""
    return Picture([START, *[IMAGE] * 4, END], {"pixel_values": draw.pixels(1, 3, 16, 16)})


FAMILIES = [
    Family(
        "paligemma",
        {
            "text_config": {"model_type": "gemma", **DECODER, "head_dim": 16},
            "vision_config": {**SIGLIP, "image_size": 12},
            "image_token_index": IMAGE,
            "projection_dim": 64,
            "hidden_size": 64,
            "vocab_size": DECODER["vocab_size"],
            "tie_word_embeddings": False,
        },
        single(9, 12),
        zeros=("token_type_ids",),
        mask="prefix",
        sees_ahead=True,
        cached=False,
    ),
    Family(
        "gemma3",
        {
            "text_config": {
                **DECODER,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": {**SIGLIP, "image_size": 16},
            "mm_tokens_per_image": 4,
            "boi_token_index": START,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        gemma3,
        mask="image-blocks",
        types=("token_type_ids",),
    ),
]
