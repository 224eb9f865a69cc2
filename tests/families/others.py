"""Families with a vision tower of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .core import (
    BOS,
    DECODER,
    END,
    EOS,
    IMAGE,
    PAD,
    ROW,
    START,
    TEXT,
    TOWER,
    VOCAB,
    Draw,
    Family,
    Inputs,
    Picture,
    Prompt,
    concatenated,
    per_row,
)

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


def kosmos2(draw: Draw) -> Picture:
    """Four latents, found by a position mask and not by their ids."""
    return Picture([START, *[IMAGE] * 4, END], {"pixel_values": draw.pixels(1, 3, 12, 12)})


def chameleon(draw: Draw) -> Picture:
    """Sixteen codes of the picture tokeniser, each of them an ordinary token id."""
    return Picture([START, *[IMAGE] * 16, END], {"pixel_values": draw.pixels(1, 3, 8, 8)})


def mllama(draw: Draw) -> Picture:
    """One placeholder; one or two tiles, read through cross-attention."""
    tiles = draw.choose([1, 2])
    pixels = pad(draw.pixels(1, tiles, 3, 8, 8), (0, 0) * 3 + (0, 4 - tiles))
    shown = (torch.arange(4) < tiles).long()[None]
    tensors = {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor([tiles]), "aspect_ratio_mask": shown}
    return Picture([IMAGE], tensors)


def crossed(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """A row's pictures on a second axis, and which tiles each token looks at: those of the last picture before it."""
    tensors = per_row(prompts, inputs)
    if not tensors:
        return {}
    shown = tensors["aspect_ratio_mask"].clone()
    missing = tensors["aspect_ratio_ids"] == 0
    tensors["aspect_ratio_mask"][..., 0][missing] = 1  # the vision tower wants a tile even where there is no picture
    latest = (inputs.images >= 0).cumsum(1) - 1
    mask = torch.zeros(*latest.shape, *shown.shape[1:], dtype=torch.long)
    for j in range(shown.shape[1]):
        mask[:, :, j] = (latest == j)[..., None] * shown[:, None, j]
    return tensors | {"cross_attention_mask": mask}


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

OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
CODES = [letters.translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for letters in map(str, range(16))]

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
    Family(
        "blip-2",
        {
            "text_config": {"model_type": "opt", **OPT},
            "vision_config": {**TOWER, "image_size": 12, "patch_size": 4},
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
            "image_token_index": IMAGE,
            "image_text_hidden_size": 32,
        },
        qformer,
        images=(1,),
        grouped=False,
    ),
    Family(
        "kosmos-2",
        {
            "text_config": {
                "vocab_size": VOCAB,
                "max_position_embeddings": 128,
                "embed_dim": 64,
                "layers": 3,
                "ffn_dim": 96,
                "attention_heads": 4,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "tie_word_embeddings": False,
            },
            "vision_config": {**TOWER, "image_size": 12, "patch_size": 4},
            "latent_query_num": 4,
            "tie_word_embeddings": False,
        },
        kosmos2,
        types=("image_embeds_position_mask",),
        images=(1,),
        left_padding=False,
        static_since=None,
        grouped=False,
    ),
    Family(
        "chameleon",
        {
            **DECODER,
            "vocabulary_map": {"<image>": IMAGE, **{f"IMGIMG{name}Z": 200 + i for i, name in enumerate(CODES)}},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": len(CODES),
                "latent_channels": 8,
                "resolution": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
        },
        chameleon,
    ),
    Family(
        "mllama",
        {
            "text_config": {
                **DECODER,
                "cross_attention_layers": [1, 3],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [1],
                "max_num_tiles": 4,
            },
            "image_token_index": IMAGE,
        },
        mllama,
        join=crossed,
        uneven=False,
        static_since="5.23",
        sees_ahead=True,
    ),
]
