"""CARVE: regions against a flood fill, pictures that stay, and any recipe behind it."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfix
from tests import families
from tests.families.checkpoints import make_checkpoint
from vlmfix.api import wrap
from vlmfix.decoders.carve import CARVE, components, crop, fuse, strongest, without_small
from vlmfix.diagnostics.looking import Gaze
from vlmfix.errors import Refusal, UsageError

from .running import RECENT


def flooded(mask):
    """Connected regions by flood fill, as frozen sets of pixels."""
    left, regions = {tuple(p) for p in np.argwhere(mask)}, set()
    while left:
        stack, region = [left.pop()], set()
        while stack:
            y, x = stack.pop()
            region.add((y, x))
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        regions.add(frozenset(region))
    return regions


@pytest.mark.parametrize("seed", range(6))
def test_regions_equal_a_flood_fill(seed):
    mask = np.random.default_rng(seed).random((23, 31)) < 0.4 + 0.05 * seed
    labels, count = components(mask)
    found = {frozenset(map(tuple, np.argwhere(labels == i))) for i in range(1, count + 1)}
    assert found == flooded(mask)
    assert ((labels > 0) == mask).all()


def test_the_strongest_regions_stay():
    mask = np.zeros((4, 9), dtype=bool)
    mask[0, :5] = mask[2, 0] = mask[2, 4:6] = True
    strength = np.ones((4, 9))
    strength[2, 0] = 10
    assert strongest(strength, mask, 1).sum() == 1
    assert strongest(strength, mask, 1, "area").sum() == 5
    assert strongest(strength, mask, 5).sum() == mask.sum()
    assert without_small(mask, 30).sum() == 7


def test_empty_and_full_masks():
    picture = Image.new("RGB", (8, 6), "red")
    assert crop(picture, np.zeros((6, 8), dtype=bool)).getextrema() == ((0, 0),) * 3
    assert crop(picture, np.ones((6, 8), dtype=bool)).size == (8, 6)
    assert components(np.zeros((3, 3), dtype=bool))[1] == 0


def test_steps_and_smoothing():
    asked, general = torch.rand(3, 2, 4, 4) + 0.1, torch.rand(5, 2, 4, 4) + 0.1
    by_step = [fuse(asked[i:], general[i:], (8, 8), steps="first") for i in range(3)]
    total = fuse(asked, general, (8, 8))
    np.testing.assert_allclose(total, by_step[0] + 2 * by_step[1] + 3 * by_step[2])
    np.testing.assert_allclose(fuse(asked, general, (8, 8), steps="last"), by_step[2])
    assert fuse(asked, general, (8, 8), 1.0, relative=True).max() < total.max()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(family, root / family) for family in ("llava", "qwen2_5_vl", "idefics3")}


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize(("family", "grid"), [("llava", (3, 3)), ("qwen2_5_vl", (3, 5))])
def test_where_the_plain_model_looks(checkpoints, family, grid):
    """Maps equal those recorded around an answer, and cover the whole picture."""
    vlm = vlmfix.load(checkpoints[family], "greedy", device="cpu")
    pictures, questions = [[picture((64, 40))], [picture((64, 40), 1)]], ["What is on the table?", "Is it?"]
    layers = (1, 2)
    found = Gaze(vlm._batcher, vlm.compiled.facts)(pictures, questions, layers, 3)
    shaped = [
        [Image.Image.resize(row[0], (64, 64), Image.Resampling.BICUBIC)] if family == "llava" else row
        for row in pictures
    ]
    for item in range(2):
        assert found[item][0].shape[2:] == grid
        with vlmfix.record(vlm, what=["map"], layers=layers) as rec:
            answer = vlm.answer(shaped[item][0], questions[item], max_new_tokens=3, details=True)
        expected = rec.map[: answer.tokens, 0][..., rec.layout.visual[0]].unflatten(-1, grid)
        torch.testing.assert_close(found[item][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["carve", "carve+pai+vcd(beta=0)", "carve(append=True)+vhr"])
def test_any_recipe_stands_behind_it(checkpoints, recipe, monkeypatch):
    vlm = vlmfix.load(checkpoints["llava"], recipe, device="cpu")
    pictures = [picture((64, 40)), None, picture((50, 50), 2)]
    redrawn = []
    original = CARVE.redraw
    monkeypatch.setattr(CARVE, "redraw", lambda self, *args: redrawn.append(original(self, *args)) or redrawn[-1])
    answers = vlm.answer(pictures, ["What is red?"] * 3, max_new_tokens=3, details=True)
    assert len(redrawn[0]) == 2
    plain = vlmfix.load(checkpoints["llava"], recipe.split("+", 1)[1] if "+" in recipe else "greedy", device="cpu")
    again = plain.answer([redrawn[0][0], None, redrawn[0][1]], ["What is red?"] * 3, max_new_tokens=3)
    assert [a.text for a in answers] == again
    assert answers[0].report["methods"]["carve"]["rows"] >= 1
    assert all(len(row) == (2 if "append" in recipe else 1) for row in redrawn[0])


def test_pictures_stay_where_the_instructions_look_alike(checkpoints):
    vlm = vlmfix.load(checkpoints["llava"], "greedy", device="cpu")
    method, gaze = CARVE(instruction="What is red?"), Gaze(vlm._batcher, vlm.compiled.facts)
    own = picture((48, 48))
    assert method.redraw([[own]], ["What is red?"], gaze, 4)[0][0] is own
    assert CARVE(instruction="Describe.").redraw([[own]], ["What is red?"], gaze, 4)[0][0].size != (0, 0)


@RECENT
def test_what_it_cannot_do_is_said(checkpoints):
    tiny = families.build("llava")
    with wrap(tiny.model, None, "carve") as vlm, pytest.raises(Refusal, match="answer"):
        vlm.generate(**tiny.inputs([1]), max_new_tokens=1)
    with vlmfix.applied(tiny.model, None, "carve"), pytest.raises(Refusal, match="answer"):
        tiny.model(**tiny.inputs([1]))
    tiles = vlmfix.load(checkpoints["idefics3"], "carve", device="cpu")
    with pytest.raises(Refusal, match="idefics3"):
        tiles.answer(picture((40, 40)), "What is red?", max_new_tokens=1)
    with pytest.raises(UsageError, match="steps"):
        vlmfix.load(checkpoints["llava"], "carve(steps=some)", device="cpu")
