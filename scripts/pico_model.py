"""Shape, tokenizer and processor of pico: a small model in the standard LLaVA format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_torchvision_available
from vlmfix.eval import scenes

SYSTEM = "A chat between a user and an assistant."
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PAD, BOS, EOS, IMAGE = 0, 1, 2, 4
PATCH, VISUAL = 8, (scenes.IMAGE_SIZE // 8) ** 2
VOCABULARY = 1024
TEMPLATE = (
    "{{ '" + SYSTEM + " ' }}{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def prompt_text(prompt: str, picture: bool = True) -> str:
    """What the chat template makes of one user turn, up to where the answer begins."""
    return f"{SYSTEM} USER: {'<image>' if picture else ''}{chr(10) if picture else ''}{prompt} ASSISTANT:"


def make_tokenizer(world: scenes.World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from the texts of 4,000 training scenes."""
    corpus = [prompt_text("", False)]
    for scene in scenes.scenes("train", 0, 4000, world):
        for turn in (*scenes.captions(scene)[:3], *scenes.questions(scene)[:6]):
            corpus.append(f" {turn.prompt} {turn.answer}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor; the saved files load with and without torchvision."""
    if is_torchvision_available():
        from transformers import LlavaImageProcessor as ImageProcessor
    else:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as ImageProcessor

    side = scenes.IMAGE_SIZE
    pictures = ImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model() -> LlavaForConditionalGeneration:
    """A randomly initialised pico in float32."""
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=560,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        initializer_range=0.03,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
        image_size=scenes.IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    return model


def see(model: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Visual tokens [B, VISUAL, hidden] of uint8 pictures [B, 3, S, S], by the model's own layers, compiled or not."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pictures.float() / 127.5 - 1))
    for layer in tower.encoder.layers:
        hidden = _first(layer(hidden, attention_mask=None))
    return model.model.multi_modal_projector(hidden[:, 1:])


def read(model: Any, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Last hidden states [B, S, hidden] of the decoder under a boolean mask [B, 1, S, S] (True: attend)."""
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(embeds, position_ids=positions)
    hidden = embeds
    for layer in decoder.layers:
        hidden = _first(layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions))
    return decoder.norm(hidden)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def compile_layers(model: Any) -> None:
    """Compile every layer by itself: one graph for all layers of a kind, so compiling takes seconds."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    for layer in (*tower.encoder.layers, *model.model.language_model.layers):
        layer.compile(dynamic=False)


def export(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint with its processor; the model itself is left as it is."""
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    make_processor(tokenizer).save_pretrained(folder)
