"""pico: it loads offline through transformers' Auto classes and answers from the picture."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlmfix.eval import scenes
from vlmfix.eval.scenes.text import article

from vlmfix import pico

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded():
    model = AutoModelForImageTextToText.from_pretrained(pico.path(), dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(pico.path())


def ask(loaded, pictures, prompts, tokens):
    model, processor = loaded
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=tokens)
    answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def test_path_needs_no_torch():
    code = "import sys; from vlmfix import pico; print((pico.path() / 'config.json').is_file(), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "True",
        "False",
    ]


def test_shape_serves_every_method(loaded):
    model, processor = loaded
    text, vision = model.config.text_config, model.config.vision_config
    assert model.config.model_type == "llava"
    assert text.num_hidden_layers >= 8
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (8, 4, 32)
    assert (vision.image_size // vision.patch_size) ** 2 >= 144
    assert (pico.path() / "model.safetensors").stat().st_size <= 15_000_000
    inputs = processor(images=Image.new("RGB", (200, 90)), text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144


def test_answers_questions_from_the_picture(loaded):
    drawn, prompts, truth = [], [], []
    for number, scene in enumerate(scenes.scenes("demo", 1, 12)):
        clear = [item.name for item in scene.objects if not item.hard]
        absent = [name for name in scenes.NAMES if name not in scene.counts and name not in scene.frequent]
        for name in clear[:1]:
            drawn += [scene, scene]
            prompts += [f"Is there {article(n)} in the image?" for n in (name, absent[7 * number % len(absent)])]
            truth += [True, False]
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in scenes.compose(scenes.pack(drawn))[0]]
    blank = [Image.new("RGB", (96, 96), "gray")] * len(pictures)
    right, blind = (
        sum(
            answer.startswith("Yes" if label else "No")
            for answer, label in zip(ask(loaded, shown, prompts, 2), truth, strict=True)
        )
        for shown in (pictures, blank)
    )
    assert len(prompts) >= 20
    assert right >= 0.85 * len(prompts)
    assert blind <= 0.6 * len(prompts)


def test_captions_name_what_is_seen(loaded):
    drawn = list(scenes.scenes("demo", 0, 6))
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in scenes.compose(scenes.pack(drawn))[0]]
    captions = ask(loaded, pictures, ["Describe the image."] * 6, 100)
    plain = [(item.name, text) for scene, text in zip(drawn, captions, strict=True) for item in scene.objects]
    clear = [
        name in text
        for (name, text), hard in zip(plain, (o.hard for s in drawn for o in s.objects), strict=True)
        if not hard
    ]
    assert sum(clear) >= 0.75 * len(clear)
    assert all(scene.kind in text for scene, text in zip(drawn, captions, strict=True))
    assert all(text.endswith(".") for text in captions)
