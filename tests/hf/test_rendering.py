"""What methods learn from the processor of the bundled model: template, question, colours, vocabulary."""

import pytest
import torch

import vlmfix
from vlmfix.api import wrap


@pytest.fixture(scope="module")
def pico():
    return vlmfix.load("pico", "greedy", device="cpu")


def test_the_question_comes_back_without_the_template(pico):
    rendering = pico._batcher
    for question in ("Is there a cat in the image?", "Describe the image."):
        assert rendering.question(rendering.behind_picture(question)) == question


def test_what_stands_behind_the_picture_is_what_a_prompt_ends_with(pico):
    from PIL import Image

    rendering, question = pico._batcher, "Is there a cat in the image?"
    ids = rendering.inputs([[Image.new("RGB", (40, 90))]], [question])["input_ids"][0].tolist()
    behind = rendering.behind_picture(question)
    assert ids[-len(behind) :] == behind
    assert ids[-len(behind) - 1] in pico.parts.image_ids


def test_black_is_black(pico):
    from PIL import Image

    mean, std = pico._batcher.colours()
    pixels = pico._batcher.inputs([[Image.new("RGB", (96, 96))]], ["What?"])["pixel_values"]
    black = torch.tensor(mean) / -torch.tensor(std)
    torch.testing.assert_close(pixels.float().amin((0, 2, 3)), black, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "name"), [("icd", "disturbance_ids"), ("iava", "instruction_ids"), ("agla", "colours")]
)
def test_methods_fill_in_what_the_processor_knows(pico, recipe, name):
    with wrap(pico.model, pico.processor, recipe) as fixed:
        assert getattr(fixed.recipe.methods[0], name) is None
        assert getattr(fixed.compiled.decoding, name)
    with pytest.raises(vlmfix.Refusal, match=f"{recipe} needs the processor"):
        wrap(pico.model, None, recipe)
