"""Models of a shape with random weights, prompts for them, and the bytes that a decoding step must read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

START, END, VIDEO, IMAGE = 5, 6, 8, 9
WORDS = (10, 4000)
"""Token ids: special ones, and the range that text is drawn from."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes and the cells it is measured in.

    Args:
        family: llava or qwen2_5_vl.
        text: settings of the decoder's configuration.
        vision: settings of the vision tower's configuration.
        dtype: of weights and activations.
        side: a picture is `side` x `side` visual tokens.
        prompts: lengths in tokens, the usual one first; longer ones are measured for a few methods.
        batches: sizes, the usual one first.
    """

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    side: int = 24
    prompts: tuple[int, ...] = (640, 4096)
    batches: tuple[int, ...] = (1, 16)

    @property
    def visual(self) -> int:
        """Visual tokens of a picture."""
        return self.side**2


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _clip(hidden: int, inner: int, layers: int, heads: int, side: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side * patch,
        "patch_size": patch,
    }


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 1e6}}


SHAPES: dict[str, Shape] = {
    "llava-7b": Shape("llava", _decoder(4096, 11008, 32, 32, 32, 32064), _clip(1024, 4096, 24, 16, 24, 14)),
    "qwen-7b": Shape(
        "qwen2_5_vl",
        {**_decoder(3584, 18944, 28, 28, 4, 152064), **_mrope(16, 24, 24)},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    ),
    "cpu": Shape(
        "llava",
        _decoder(512, 1376, 8, 8, 8, 4096),
        _clip(64, 128, 3, 4, 24, 14),
        torch.float32,
        prompts=(640,),
        batches=(1,),
    ),
    "tiny-llava": Shape(
        "llava", _decoder(64, 96, 4, 4, 2, 4096), _clip(32, 48, 2, 2, 3, 4), torch.float32, 3, (24, 40), (1, 2)
    ),
    "tiny-qwen": Shape(
        "qwen2_5_vl",
        {**_decoder(64, 96, 4, 4, 2, 4096), **_mrope(2, 3, 3)},
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        torch.float32,
        3,
        (24, 40),
        (1, 2),
    ),
}
"""The 7B shapes have the published decoders and vision towers; the others run on a CPU in seconds."""


def build(name: str, device: str, attention: str = "sdpa") -> Any:
    """A model of a shape with random weights, made on the device; it ends no answer by itself."""
    shape = SHAPES[name]
    config: Any
    kind: Any
    if shape.family == "llava":
        kind, vision = LlavaForConditionalGeneration, CLIPVisionConfig(**shape.vision)
        config = LlavaConfig(text_config=LlamaConfig(**shape.text), vision_config=vision, image_token_id=IMAGE)
    else:
        kind = Qwen2_5_VLForConditionalGeneration
        config = Qwen2_5_VLConfig(
            text_config=shape.text,
            vision_config=shape.vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=shape.dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(name: str, batch: int, length: int, device: str, seed: int = 1) -> dict[str, Tensor]:
    """A batch of prompts of `length` tokens with one picture each; the seed is the pictures', the text stays."""
    shape = SHAPES[name]
    text = torch.randint(*WORDS, (batch, length - shape.visual), generator=torch.Generator().manual_seed(1))
    if shape.family != "llava":
        text[:, 7], text[:, 8] = START, END
    ids = torch.cat([text[:, :8], torch.full((batch, shape.visual), IMAGE), text[:, 8:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(seed)
    if shape.family == "llava":
        size = shape.vision["image_size"]
        pixels = torch.randn(batch, 3, size, size, generator=generator)
    else:
        grid, patch = 2 * shape.side, shape.vision.get("patch_size", 14)
        pixels = torch.randn(batch * grid**2, 3 * 2 * patch**2, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, grid, grid]] * batch)
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    inputs["pixel_values"] = pixels.to(shape.dtype)
    return {key: value.to(device) for key, value in inputs.items()}


def weight_bytes(model: Any) -> int:
    """Bytes of weights that every decoding step reads: the decoder and its output head, not the embeddings."""
    read = {id(p): p for p in [*model.model.language_model.parameters(), *model.get_output_embeddings().parameters()]}
    read.pop(id(model.get_input_embeddings().weight))
    return sum(p.numel() * p.element_size() for p in read.values())


def token_bytes(name: str) -> int:
    """Bytes of keys and values of one token of one row."""
    shape = SHAPES[name]
    head = shape.text["hidden_size"] // shape.text["num_attention_heads"]
    values: int = 2 * shape.text["num_hidden_layers"] * shape.text["num_key_value_heads"] * head
    return values * torch.empty(0, dtype=shape.dtype).element_size()
