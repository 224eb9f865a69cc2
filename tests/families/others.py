"""Families with a vision tower of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .core import DECODER, END, IMAGE, ROW, START, TEXT, TOWER, Draw, Family, Inputs, Picture, Prompt, concatenated

LLAMA = {"model_type": "llama", **DECODER}
QWEN2 = {"model_type": "qwen2", **DECODER}


def pixtral(draw: Draw) -> Picture:
    """Rows of merged patches, each ended by a separator; pictures of a batch are padded to 24 x 24 pixels."""
    height, width = draw.choose([(16, 16), (16, 24), (24, 16)])
    rows, columns = height // 8, width // 8
    ids = [token for _ in range(rows) for token in (*[IMAGE] * columns, ROW)]
    pixels = pad(draw.pixels(1, 3, height, width), (0, 24 - width, 0, 24 - height))
    return Picture([*ids[:-1], END], {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def got_ocr2(draw: Draw) -> Picture:
    """Four tokens between start and end."""
    return Picture([START, *[IMAGE] * 4, END], {"pixel_values": draw.pixels(1, 3, 32, 32)})


def qformer(draw: Draw) -> Picture:
    """Four outputs of the Q-Former."""
    return Picture([IMAGE] * 4, {"pixel_values": draw.pixels(1, 3, 12, 12)})


def instructed(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """The question goes to the Q-Former too, right-padded."""
    questions = [torch.tensor([t for t in p.ids if t >= TEXT][:6]) for p in prompts]
    longest = max(len(q) for q in questions)
    return concatenated(prompts, inputs) | {
        "qformer_input_ids": torch.stack([pad(q, (0, longest - len(q))) for q in questions]),
        "qformer_attention_mask": torch.stack([pad(torch.ones_like(q), (0, longest - len(q))) for q in questions]),
    }


QFORMER = {
    **{k: v for k, v in DECODER.items() if k in ("vocab_size", "pad_token_id")},
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 32,
    "cross_attention_frequency": 1,
    "max_position_embeddings": 64,
}

FAMILIES = [
    Family(
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **DECODER, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **TOWER, "image_size": 32, "patch_size": 4, "head_dim": 16},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        pixtral,
    ),
    Family(
        "got_ocr2",
        {
            "text_config": QWEN2,
            "vision_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 4,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            "image_token_index": IMAGE,
            "image_seq_length": 4,
            "tie_word_embeddings": False,
        },
        got_ocr2,
    ),
    Family(
        "instructblip",
        {
            "text_config": LLAMA,
            "vision_config": {**TOWER, "image_size": 12, "patch_size": 4},
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
            "image_token_index": IMAGE,
        },
        qformer,
        join=instructed,
        images=(1,),
    ),
]
