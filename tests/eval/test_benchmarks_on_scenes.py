"""Scenes are a data set of POPE, CHAIR, AMBER and MME, wording included."""

import json
import re

import pytest
from vlmfix.eval.benchmarks import load, score_file
from vlmfix.eval.benchmarks.answers import pictures
from vlmfix.eval.benchmarks.files import Problems
from vlmfix.eval.scenes import text
from vlmfix.eval.scenes.files import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("scenes"), 24)


@pytest.mark.parametrize(("name", "option"), [("pope", "coco"), ("chair", "truth"), ("amber", "coco"), ("mme", "coco")])
def test_every_benchmark_takes_the_folder(folder, name, option):
    benchmark = load(name, **{option: folder})
    items = benchmark.items()
    assert len({item.id for item in items}) == len(items) >= 24
    problems = Problems()
    assert len(pictures(items, folder, problems)) == len({item.image for item in items})
    score = benchmark.score([{"id": item.id, "text": item.truth.get("label", "A dog.").capitalize()} for item in items])
    assert problems.kinds == {}
    assert list(score.problems) == []
    assert len(score.ids) == len(items)


def test_its_own_captions_hallucinate_nothing(folder, tmp_path):
    said = json.loads((folder / "captions.json").read_text())["annotations"]
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "".join(json.dumps({"image_id": row["image_id"], "caption": row["caption"]}) + "\n" for row in said[::5])
    )
    figures = score_file(path, "chair", truth=folder / "instances.json", scorer="corrected").figures()
    assert figures["chair_i"] == 0
    assert figures["recall"] == 100


def test_questions_are_worded_as_the_world_words_them(folder):
    known = []
    for item in load("mme", coco=folder).items():
        known.append(re.sub("|".join(sorted(text.NAMES, key=len, reverse=True)), "X", item.prompt))
    ending = r" Please answer yes or no\."
    forms = (
        r"Is there an? X in this image\?",
        r"Is there only one X in this image\?",
        r"Is the X on the (left|right) side of the X\?",
    )
    for prompt in known:
        count = re.fullmatch(rf"Are there ({'|'.join(text.NUMBERS[2:])}) .+ in this image\?{ending}", prompt)
        assert count or any(re.fullmatch(form + ending, prompt) for form in forms), prompt
