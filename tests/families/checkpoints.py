"""Tiny complete checkpoints as they lie on the Hub: model, tokenizer, processor and chat template, made offline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import SPECS
from .core import construct

COMMON = ["<pad>", "<s>", "</s>", "<unk>"]
CORPUS = [
    "Describe the image in detail. What is on the table? Is there a fork in the picture? Yes, there is. No.",
    "The photo shows a kitchen with a table, two chairs, a bottle and a cup; a dog sleeps under the table.",
    "A man rides a red bicycle along the street, next to a parked car and a traffic light. How many birds are there?",
    "USER ASSISTANT User Assistant user assistant system You are a helpful assistant. Answer with yes or no.",
]

PLAIN = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content[0].text }} {% else %}{{ m.role | upper }}: "
    "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% for c in m.content %%}{%% if c.type == 'image' %%}%s"
    "{%% else %%}{{ c.text }}{%% endif %%}{%% endfor %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
IDEFICS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """What a family's checkpoint folder holds beside the weights.

    Args:
        tokens: special tokens after the common four.
        ids: config keys of special tokens.
        image_processor: class name without torchvision's or PIL's suffix, and its settings.
        processor: class name, and its settings.
        template: chat template.
        named: tokenizer attributes that the processor reads.
    """

    tokens: list[str]
    ids: dict[str, str]
    image_processor: tuple[str, dict[str, Any]]
    processor: tuple[str, dict[str, Any]]
    template: str
    named: dict[str, str] = field(default_factory=dict)


QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_IMAGES = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1024},
}
IDEFICS_TOKENS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
IDEFICS_TOKENS += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
IDEFICS_IMAGES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
GLM_TOKENS = ["image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video"]
GLM_IDS = ["image", "video", "image_start", "image_end", "video_start", "video_end"]
MINICPM_TOKENS = ["image", "video", "image_start", "image_end", "slice_start", "slice_end"]
MINICPM_TOKENS += ["image_id_start", "image_id_end"]


def qwen(processor: str) -> Recipe:
    """A Qwen-VL checkpoint with one of its three processors."""
    template = CHATML % "<|vision_start|><|image_pad|><|vision_end|>"
    return Recipe(QWEN_TOKENS, QWEN_IDS, ("Qwen2VLImageProcessor", QWEN_IMAGES), (processor, {}), template)


RECIPES = {
    "llava": Recipe(
        ["<image>"],
        {"image_token_index": "<image>"},
        ("LlavaImageProcessor", {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}),
        (
            "LlavaProcessor",
            {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        PLAIN,
        {"image_token": "<image>"},
    ),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "idefics3": Recipe(
        IDEFICS_TOKENS,
        {"image_token_id": "<image>"},
        ("Idefics3ImageProcessor", IDEFICS_IMAGES),
        ("Idefics3Processor", {"image_seq_len": 4}),
        IDEFICS,
    ),
    "smolvlm": Recipe(
        [*IDEFICS_TOKENS, "<video>"],
        {"image_token_id": "<image>"},
        ("SmolVLMImageProcessor", IDEFICS_IMAGES),
        ("SmolVLMProcessor", {"image_seq_len": 4}),
        IDEFICS,
    ),
    "llava_onevision": Recipe(
        ["<image>", "<video>"],
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        (
            "LlavaOnevisionImageProcessor",
            {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]},
        ),
        ("LlavaOnevisionProcessor", {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}),
        PLAIN,
    ),
    "video_llama_3": Recipe(
        ["<|image_pad|>", "<|video_pad|>"],
        {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        ("VideoLlama3ImageProcessor", {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}),
        ("VideoLlama3Processor", {}),
        PLAIN.replace("<image>", "<|image_pad|>"),
    ),
    "glm4v": Recipe(
        [f"<|{name}|>" for name in GLM_TOKENS],
        {f"{name}_token_id": f"<|{token}|>" for name, token in zip(GLM_IDS, GLM_TOKENS, strict=True)},
        ("Glm4vImageProcessor", QWEN_IMAGES),
        ("Glm4vProcessor", {}),
        PLAIN.replace("<image>", "<|begin_of_image|><|image|><|end_of_image|>"),
    ),
    "llava_next_video": Recipe(
        ["<image>", "<video>"],
        {"image_token_index": "<image>", "video_token_index": "<video>"},
        (
            "LlavaNextImageProcessor",
            {
                "size": {"shortest_edge": 8},
                "crop_size": {"height": 8, "width": 8},
                "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]],
            },
        ),
        (
            "LlavaNextVideoProcessor",
            {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        PLAIN,
    ),
    "minicpmv4_6": Recipe(
        [f"<{name}>" for name in MINICPM_TOKENS],
        {"image_token_id": "<image>", "video_token_id": "<video>"},
        ("MiniCPMV4_6ImageProcessor", {"patch_size": 4, "scale_resolution": 32, "max_slice_nums": 2}),
        ("MiniCPMV4_6Processor", {}),
        PLAIN,
        {f"{name}_token": f"<{name}>" for name in MINICPM_TOKENS},
    ),
    "internvl": Recipe(
        ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        {"image_token_id": "<IMG_CONTEXT>"},
        (
            "GotOcr2ImageProcessor",
            {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "min_patches": 1, "max_patches": 3},
        ),
        ("InternVLProcessor", {"image_seq_length": 4}),
        CHATML % "<IMG_CONTEXT>\n",
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
}


def make_tokenizer(special: list[str], named: dict[str, str] | None = None) -> Any:
    """A byte-level BPE tokenizer of at most 400 tokens, the special ones first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*COMMON, *special], initial_alphabet=sorted(alphabet))
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named or {},
    )


def make_checkpoint(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Writes a checkpoint that AutoModelForImageTextToText loads, with the processor files of a Hub repository.

    Args:
        family: one of `RECIPES`.
        folder: where to write; made if missing.
        seed: of the weights.

    Returns:
        The folder.
    """
    recipe = RECIPES[family]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(recipe.tokens, recipe.named)
    over: dict[str, Any] = {key: tokenizer.convert_tokens_to_ids(token) for key, token in recipe.ids.items()}
    over["text_config"] = {"vocab_size": len(tokenizer)}
    special = len(COMMON) + len(recipe.tokens)
    construct(SPECS[family], seed, over, special).model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor, settings = recipe.image_processor
    name, arguments = recipe.processor
    _write(folder / "preprocessor_config.json", image_processor_type=image_processor, processor_class=name, **settings)
    _write(folder / "processor_config.json", processor_class=name, **arguments)
    (folder / "chat_template.jinja").write_text(recipe.template)
    return folder


def _write(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))
