"""Families that cut a picture into tiles: one run of placeholders per tile, or tiles inside one run."""

from __future__ import annotations

import torch

from .core import DECODER, END, GLOBAL, IMAGE, ROW, SEP, START, TOWER, Draw, Family, Picture, per_row

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


def idefics2(draw: Draw) -> Picture:
    """One tile of any shape, four latents of the resampler; smaller pictures are padded to 16 pixels."""
    height, width = draw.choose([(16, 16), (8, 16), (16, 12)])
    inside = torch.zeros(1, 1, 16, 16)
    inside[..., :height, :width] = 1
    tensors = {"pixel_values": draw.pixels(1, 3, 16, 16) * inside[0], "pixel_attention_mask": inside[0].long()}
    return Picture([START, *[IMAGE] * 4, START], tensors)


def ovis2(draw: Draw) -> Picture:
    """One or two tiles of 4 tokens, framed by indicator tokens that are embedded by the vision side."""
    tiles = draw.choose([1, 2])
    ids = [START, *[token for _ in range(tiles) for token in (*[IMAGE] * 4, SEP)], END]
    return Picture(ids, {"pixel_values": draw.pixels(tiles, 3, 16, 16)})


def llama4(draw: Draw) -> Picture:
    """A global tile, alone or after two others with separators between."""
    tiles = draw.choose([1, 3])
    cut = [token for _ in range(tiles - 1) for token in (*[IMAGE] * 4, SEP)]
    return Picture([START, *cut, GLOBAL, *[IMAGE] * 4, END], {"pixel_values": draw.pixels(tiles, 3, 16, 16)})


IDEFICS3 = {
    "text_config": LLAMA,
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}

COHERE2 = {
    "model_type": "cohere2",
    **DECODER,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "logit_scale": 0.5,
}
SIGLIP16 = {"model_type": "siglip_vision_model", **TOWER, "image_size": 16, "patch_size": 4, "vision_use_head": False}

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
    Family(
        "idefics2",
        {
            "text_config": {"model_type": "mistral", **DECODER, "head_dim": 16, "sliding_window": None},
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE,
        },
        idefics2,
        join=per_row,
    ),
    Family(
        "aya_vision",
        {"text_config": COHERE2, "vision_config": SIGLIP16, "image_token_index": IMAGE, "tie_word_embeddings": False},
        internvl,
        mask="window",
    ),
    Family(
        "cohere2_vision",
        {
            "text_config": COHERE2,
            "vision_config": SIGLIP16,
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
        internvl,
        mask="window",
    ),
    Family(
        "ovis2",
        {
            "text_config": QWEN2,
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 4, "hidden_stride": 2, "vocab_size": 40},
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [START, END, SEP, ROW, GLOBAL],
            "vocab_size": DECODER["vocab_size"],
            "hidden_size": 64,
            "tie_word_embeddings": False,
        },
        ovis2,
    ),
    Family(
        "llama4",
        {
            "text_config": {
                **DECODER,
                "head_dim": 16,
                "intermediate_size_mlp": 96,
                "num_local_experts": 2,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **TOWER,
                "intermediate_size": 128,
                "image_size": 16,
                "patch_size": 4,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
            "boi_token_index": START,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
        },
        llama4,
        mask="chunk",
        beams_until="5.23",
        static_since="5.23",
    ),
]
