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


@pytest.fixture
def scripts(request, monkeypatch):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "scripts"))


def test_built_in_scoring_by_hand(scripts):
    from pico_eval import chair, mentions, pope

    text = "A bedroom with two teddy bears, a bear, a pair of scissors and three wine glasses. People and mice."
    assert [name for name, _, _ in mentions(text)] == ["teddy bear", "bear", "scissors", "wine glass", "mouse"]
    one, other = (scenes.scene("test", 0, number) for number in (0, 1))
    typical = next(name for name in one.frequent if name not in one.counts)
    stranger = next(name for name in scenes.NAMES if name not in one.counts and name not in one.frequent)
    present = list(one.counts)
    said = f"There is {article(present[0])}, {article(typical)} and {article(stranger)}."
    figures = chair([said, "Nothing."], [one, other])
    assert figures["chair_s"] == 50
    assert figures["chair_i"] == pytest.approx(200 / 3)
    assert figures["recall"] == pytest.approx(100 / (len(one.counts) + len(other.counts)))
    assert figures["typical_share"] == 50
    told = {(0, "cat"): True, (0, "dog"): True, (0, "bus"): False, (0, "car"): False}
    score = pope(told, [(0, "cat", True), (0, "dog", False), (0, "bus", False), (0, "car", True)])
    assert score == {"accuracy": 50.0, "yes_ratio": 50.0, "f1": 50.0, "questions": 4}


def test_packed_questions_equal_single_ones(scripts, loaded):
    from pico_eval import answers

    model, processor = loaded
    drawn = list(scenes.scenes("tuning", 2, 4))
    pictures, _ = scenes.compose(scenes.pack(drawn))
    asked = [(row, name) for row, scene in enumerate(drawn) for name in (*scene.frequent, "cat", "zebra")]
    with torch.inference_mode():
        told = answers(model, processor.tokenizer, pictures, asked, 3)
    images = [Image.fromarray(pictures[row].permute(1, 2, 0).numpy()) for row, _ in asked]
    single = ask(loaded, images, [f"Is there {article(name)} in the image?" for _, name in asked], 1)
    assert [told[key] for key in asked] == [answer == "Yes" for answer in single]
    assert 0 < sum(told.values()) < len(told)
