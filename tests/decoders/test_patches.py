"""Patches: agreement worked by hand, short answers left alone, and any recipe, batch or seed beneath it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlmfix
from tests import families
from tests.families.checkpoints import make_checkpoint
from vlmfix.api import wrap
from vlmfix.attention.request import NO_PICTURE
from vlmfix.decoders.patches import APART, PLACES, SHORT, Patches, cut, describes, merge, sentences, words
from vlmfix.errors import Refusal, UsageError
from vlmfix.hf import hooks

WHOLE = "The image shows a kitchen. There is a large dog on the left. Two cups and a fork lie there."
CROPS = {
    "upper left": "A kitchen. A small dog can be seen. A clock is at the top.",
    "upper right": "The picture shows a kitchen. There is a clock and a cup.",
    "lower left": "This is a kitchen. A dog sleeps under a clock.",
}


def merged(agree, share, add):
    kept, dropped, added = merge(WHOLE, CROPS, agree, share, add)
    return [s.strip() for s in kept], [s.strip() for s in dropped], added


def test_sentences_stay_where_enough_views_name_their_words():
    """Views that name kitchen: 4, dog: 3, cup: 2, fork and lie: 1."""
    kitchen, dog, cups = (sentence.strip() for sentence in sentences(WHOLE))
    assert merged(1, 1.0, None) == ([kitchen, dog, cups], [], [])
    assert merged(2, 1.0, None) == ([kitchen, dog], [cups], [])
    assert merged(2, 1 / 3, None) == ([kitchen, dog, cups], [], [])
    assert merged(3, 1 / 3, None) == ([kitchen, dog], [cups], [])
    assert merged(4, 0.5, None) == ([kitchen], [dog, cups], [])
    assert merged(4, 0.0, None) == ([kitchen, dog, cups], [], [])


def test_what_the_crops_share_is_added_once_with_its_place():
    """The clock is named by three crops, the dog by two, sleep by one."""
    assert merged(2, 1.0, 1.0)[2] == [("upper left", "A clock is at the top.")]
    assert merged(4, 0.5, 2 / 3)[2] == [
        ("upper left", "A small dog can be seen."),
        ("upper left", "A clock is at the top."),
    ]
    assert ("lower left", "A dog sleeps under a clock.") in merged(4, 0.5, 1 / 3)[2]
    assert merge(WHOLE + " A clock.", CROPS, 2, 1.0, 1.0)[2] == []


def test_the_text_is_made_of_sentences_that_were_written():
    settled = Patches(agree=2)._settled(WHOLE + "\n\nThe end.", CROPS)
    assert settled.text == (
        "The image shows a kitchen. There is a large dog on the left. In the upper left: A clock is at the top."
    )
    assert settled.notes == {
        "crops": 3,
        "dropped": ["Two cups and a fork lie there.", "The end."],
        "added": ["In the upper left: A clock is at the top."],
    }


@pytest.mark.parametrize("text", ["A cat sleeps. A bird sings.", "A cat sleeps. There is a"])
def test_where_the_crops_agree_on_nothing_the_answer_stays(text):
    settled = Patches()._settled(text, CROPS)
    assert settled.text == text
    assert settled.notes == {"crops": 3, "inactive": APART}


def test_nothing_is_added_to_a_sentence_that_was_cut_off():
    settled = Patches(agree=2)._settled("A kitchen. There is a", CROPS)
    assert settled.text == "A kitchen. There is a\nIn the upper left: A clock is at the top."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two dogs, a box of glasses and 3 buses.", {"dog", "box", "glass", "3", "bus"}),
        ("People show their puppies to a man's child", {"person", "puppy", "man", "child"}),
        ("There is a large one on the left of the image.", set()),
        ("", set()),
    ],
)
def test_words(text, found):
    assert words(text) == found


def test_sentences_keep_their_blanks():
    text = 'He said "Stop!" and left. At 3.5 m: a box...\n- one\n- two\n\nAn end without a stop'
    parts = sentences(text)
    assert "".join(parts) == text
    assert [part.strip() for part in parts] == [
        *('He said "Stop!"', "and left.", "At 3.5 m: a box...", "- one", "- two", "An end without a stop")
    ]
    assert sentences("  ") == []


@pytest.mark.parametrize(
    ("text", "long"),
    [
        ("A dog. A cat.", True),
        ("A dog and a cat.", False),
        ("Yes. There is a dog.", False),
        ("no, there is none. Look.", False),
        ("Nothing is there. Nobody is.", True),
        ("", False),
    ],
)
def test_descriptions_are_told_from_short_answers(text, long):
    assert describes(text) == long


def test_crops_cover_their_corner_at_full_size():
    rows, columns = np.mgrid[:40, :60]
    picture = Image.fromarray(np.stack([columns * 4, rows * 4, 0 * rows], -1).astype(np.uint8))
    for place, (across, down) in PLACES.items():
        part = cut(picture, place, 0.5)
        assert part.size == picture.size
        left, top = (int(channel.getextrema()[0]) / 4 for channel in part.split()[:2])
        assert (left, top) == pytest.approx((30 * across, 20 * down), abs=1)
    assert np.array_equal(np.asarray(cut(picture, "centre", 1.0)), np.asarray(picture))
    assert cut(Image.new("RGB", (1, 1)), "lower right", 0.1).size == (1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def pico():
    with vlmfix.load("pico", "patches", device="cpu") as vlm:
        yield vlm


ASK = "Please describe this image in detail."
SCENES = [Path(__file__).parents[2] / f"examples/scenes/images/{i:06d}.png" for i in range(1, 4)]


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def same(one, other):
    return (one.text, one.tokens, one.report["methods"]) == (other.text, other.tokens, other.report["methods"])


@pytest.mark.parametrize("recipe", ["greedy", "vcd"])
def test_crops_are_answered_by_the_rest_of_the_recipe(recipe):
    """The merge of what that recipe says about the pictures and, asked apart, about their crops."""
    images = [Image.open(path).convert("RGB") for path in SCENES[:2]]
    with vlmfix.load("pico", recipe, device="cpu") as rest:
        whole = rest.answer(images, ASK, max_new_tokens=24, details=True)
        crops = {p: rest.answer([cut(i, p, 0.8) for i in images], ASK, max_new_tokens=24, details=True) for p in PLACES}
    with vlmfix.load("pico", [recipe, "patches"], device="cpu") as vlm:
        got = vlm.answer(images, ASK, max_new_tokens=24, details=True)
    for i, answer in enumerate(got):
        want = Patches()._settled(whole[i].text, {place: found[i].text for place, found in crops.items()})
        assert answer.text == want.text
        assert answer.report["methods"]["patches"] == {"rows": 1, **want.notes}
        assert answer.tokens == whole[i].tokens + sum(found[i].tokens for found in crops.values())
        assert answer.seconds > 0
        assert answer.evidence.get("margin") == whole[i].evidence.get("margin")
        assert set(answer.report["methods"]) == {*whole[i].report.get("methods", {}), "patches"}
        json.dumps(answer.report)


def test_an_answer_does_not_depend_on_the_batch(pico):
    images = [SCENES[0], None, SCENES[:2]]
    options = {"max_new_tokens": 24, "details": True}
    together = pico.answer(images, ASK, **options)
    for image, answer in zip(images, together, strict=True):
        assert same(pico.answer([image], [ASK], **options)[0], answer)
    assert together[1].report["methods"]["patches"] == {"rows": 0, "inactive": NO_PICTURE}
    assert together[2].report["methods"]["patches"]["crops"] == 5


def test_a_seeded_answer_does_not_depend_on_the_batch(pico):
    options = {"max_new_tokens": 24, "details": True, "do_sample": True, "seed": 3}
    together = pico.answer(SCENES[:2], ASK, ids=["a", "b"], **options)
    for image, name, answer in zip(SCENES, "ab", together, strict=False):
        assert same(pico.answer([image], ASK, ids=[name], **options)[0], answer)
    assert together[0].text != pico.answer([SCENES[0]], ASK, ids=["a"], **{**options, "seed": 4})[0].text


def test_yes_and_no_are_left_alone_and_said_so(pico, caplog, monkeypatch):
    monkeypatch.setattr(hooks, "_WARNED", set())
    questions = ["Is there a fork in the image?", "Is there a person in the image?", ASK]
    with vlmfix.load("pico", "greedy", device="cpu") as plain:
        want = plain.answer(SCENES, questions, max_new_tokens=24, details=True)
    with caplog.at_level(logging.WARNING, "vlmfix"):
        got = pico.answer(SCENES, questions, max_new_tokens=24, details=True)
    for answer, other in zip(got[:2], want[:2], strict=True):
        assert (answer.text, answer.tokens) == (other.text, other.tokens)
        assert answer.evidence["margin"] == other.evidence["margin"]
        assert answer.report["methods"]["patches"] == {"rows": 0, "inactive": SHORT}
    assert got[2].report["methods"]["patches"]["rows"] == 1
    assert got[2].tokens > want[2].tokens
    assert [record.message for record in caplog.records] == [f"patches leaves answers as they are: {SHORT}"]
    report = pico.report["methods"]["patches"]
    assert report["rows"] == 1
    assert report["left_alone"] == {SHORT: 2}
    assert "inactive" not in report
    pico.answer(SCENES, questions[0], max_new_tokens=20)
    assert pico.report["methods"]["patches"] == {"rows": 0, "left_alone": {SHORT: 3}, "inactive": SHORT}


def test_the_report_counts_what_was_dropped_and_added():
    with vlmfix.load("pico", "patches(agree=5,share=1,add=0.4)", device="cpu") as vlm:
        answers = vlm.answer(SCENES, ASK, max_new_tokens=60, details=True)
        notes = [answer.report["methods"]["patches"] for answer in answers]
        counts = {key: sum(len(note.get(key, ())) for note in notes) for key in ("dropped", "added")}
        assert min(counts.values()) > 0
        total = vlm.report["methods"]["patches"]
        assert {key: total[key] for key in counts} == counts
        assert vlm.report["recipe"] == str(vlm.recipe)


def test_another_instruction_for_the_crops():
    with vlmfix.load("pico", "patches(instruction='Is there a fork in the image?')", device="cpu") as vlm:
        answer = vlm.answer(SCENES[0], ASK, max_new_tokens=24, details=True)
    with vlmfix.load("pico", device="cpu") as plain:
        assert answer.text == plain.answer(SCENES[0], ASK, max_new_tokens=24)
    assert answer.report["methods"]["patches"] == {"rows": 0, "crops": 5, "inactive": APART}


def test_recorders_see_the_whole_picture_alone(pico):
    image = Image.open(SCENES[0]).convert("RGB")
    with vlmfix.load("pico", device="cpu") as plain, vlmfix.record(plain) as want:
        plain.answer(image, ASK, max_new_tokens=30)
    with vlmfix.record(pico) as got:
        pico.answer(image, ASK, max_new_tokens=30)
    assert got.visual_mass.equal(want.visual_mass)


def test_pictures_are_redrawn_before_they_are_cut(folder, monkeypatch):
    """A picture method's pictures are those whose crops answer."""
    images = [picture((64, 40)), picture((50, 50), 2)]
    given, original = [], Patches.settle
    monkeypatch.setattr(Patches, "settle", lambda self, *args: given.append(args) or original(self, *args))
    vlm = vlmfix.load(folder, "patches+carve(append=True)", device="cpu")
    answers = vlm.answer(images, "What is red?", max_new_tokens=3, details=True)
    assert [len(row) for row in given[0][1]] == [2, 2]
    assert all(set(answer.report["methods"]) == {"carve", "patches"} for answer in answers)


def test_what_it_cannot_do_is_said(folder):
    tiny = families.build("llava")
    with wrap(tiny.model, None, "patches") as vlm, pytest.raises(Refusal, match="answer"):
        vlm.generate(**tiny.inputs([1]), max_new_tokens=1)
    with vlmfix.applied(tiny.model, None, "patches"), pytest.raises(Refusal, match=r"patches .*call answer"):
        tiny.model.generate(**tiny.inputs([1]), max_new_tokens=1)
    with vlmfix.applied(tiny.model, None, "patches"), pytest.raises(Refusal, match=r"patches .*call answer"):
        tiny.model(**tiny.inputs([1]))
    with vlmfix.load(folder, "patches", device="cpu") as vlm, pytest.raises(Refusal, match="streamed"):
        vlm.answer(picture((40, 40)), ASK, max_new_tokens=1, streamer=object())
    with pytest.raises(Refusal, match="patches and patches both settle whole answers"):
        vlmfix.load(folder, "patches+patches(agree=2)", device="cpu")
    for wrong in ("agree=7", "agree=6,centre=False", "size=0", "share=2", "add=0"):
        with pytest.raises(UsageError, match=wrong.split("=")[0]):
            vlmfix.load(folder, f"patches({wrong})", device="cpu")


def test_neutral_settings_are_dropped(folder):
    for recipe in ("patches(share=0,add=None)", "patches(agree=1,add=None)"):
        vlm = vlmfix.load(folder, recipe, device="cpu")
        assert vlm.compiled.answer is None
        assert vlm.compiled.dropped == ("patches",)
