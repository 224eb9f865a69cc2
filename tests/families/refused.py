"""Families that vlmfix refuses: the picture stays in an encoder, or the decoder's attention cannot be reached."""

from __future__ import annotations

from .core import BOS, EOS, IMAGE, PAD, TOWER, VOCAB, Draw, Family, Picture

TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
BERT = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
VIT = {**TOWER, "image_size": 12, "patch_size": 4}


def outside(draw: Draw) -> Picture:
    """A picture without a place in the prompt."""
    return Picture([], {"pixel_values": draw.pixels(1, 3, 12, 12)})


FAMILIES = [
    Family(
        "florence2",
        {
            "text_config": {
                "model_type": "bart",
                **TOKENS,
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "max_position_embeddings": 64,
                "decoder_start_token_id": EOS,
                "forced_eos_token_id": None,
            },
            "vision_config": {
                "depths": [1],
                "patch_size": [4],
                "patch_stride": [4],
                "patch_padding": [0],
                "patch_prenorm": [False],
                "embed_dim": [32],
                "num_heads": [2],
                "num_groups": [2],
                "window_size": 3,
                "projection_dim": 32,
                "max_temporal_embeddings": 4,
                "max_position_embeddings": 8,
            },
            "image_token_id": IMAGE,
        },
        outside,
    ),
    Family(
        "pix2struct",
        {
            "text_config": {
                **TOKENS,
                "hidden_size": 32,
                "d_kv": 16,
                "d_ff": 48,
                "num_layers": 2,
                "num_heads": 2,
                "decoder_start_token_id": PAD,
            },
            "vision_config": {**TOWER, "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 16, "seq_len": 16},
        },
        outside,
    ),
    Family(
        "vision-encoder-decoder",
        {
            "encoder": {"model_type": "vit", **VIT},
            "decoder": {"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": BOS,
            "pad_token_id": PAD,
        },
        outside,
    ),
    Family(
        "blip",
        {
            "text_config": {**BERT, "encoder_hidden_size": 32, "projection_dim": 32},
            "vision_config": {**VIT, "projection_dim": 32},
            "projection_dim": 32,
            "image_text_hidden_size": 32,
        },
        outside,
    ),
    Family("git", {**BERT, "vision_config": VIT}, outside),
]
