import json

import pytest
from vlmfix.eval.benchmarks.mme import Mme
from vlmfix.eval.benchmarks.yesno import four

from vlmfix.errors import UsageError

from .coco_world import named, write


def folder(path):
    """MME's own layout: one category flat, one with sub-folders."""
    flat, deep = path / "existence", path / "color"
    flat.mkdir()
    (deep / "images").mkdir(parents=True)
    (deep / "questions_answers_YN").mkdir()
    for number in (1, 2):
        (flat / f"{number}.jpg").write_bytes(b"")
        text = f"Is there a dog {number}? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
        (flat / f"{number}.txt").write_text(text)
    (deep / "images" / "1.png").write_bytes(b"")
    (deep / "questions_answers_YN" / "1.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    return path


def test_scores_by_hand(tmp_path):
    benchmark = Mme(folder(tmp_path))
    items = benchmark.items()
    assert [item.id for item in items][:3] == ["color/1/1", "color/1/2", "existence/1/1"]
    assert items[0].image == "color/images/1.png"
    assert items[0].prompt == "Is it red? Please answer yes or no."
    assert items[2].prompt == "Is there a dog 1? Please answer yes or no."
    texts = ["Yes", "no", "yes, it is", "No.", "Yes", "There"]
    score = benchmark.score([{"id": i.id, "text": t} for i, t in zip(items, texts, strict=True)])
    figures = score.figures()
    assert figures["color/score"] == 200
    assert figures["existence/acc"] == 75
    assert figures["existence/acc+"] == 50
    assert figures["score"] == 325
    assert figures["unparsed"] == pytest.approx(100 / 6)
    assert named(score) == {"answers that are neither yes nor no, wrong": ["existence/2/2"]}
    assert score.clusters[2:4] == ["existence/1.jpg"] * 2
    one = Mme(tmp_path, categories="color")
    assert [item.truth["category"] for item in one.items()] == ["color"] * 2
    with pytest.raises(UsageError, match="did you mean color"):
        Mme(tmp_path, categories="colour").items()


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", "yes"),
        (" no\n", "no"),
        ("Not at all", "no"),
        ("Yes, no", "yes"),
        ("It is", "neither"),
        ("The no", "neither"),
        ("", "neither"),
    ],
)
def test_the_first_four_characters(text, verdict):
    assert four(text) == verdict


def test_half_answered_pictures_are_left_out_and_named(tmp_path):
    benchmark = Mme(folder(tmp_path), categories="existence")
    ids = [item.id for item in benchmark.items()]
    answers = [{"id": i, "text": "Yes"} for i in ids[:3]] + [{"id": ids[3], "error": "broken picture"}]
    score = benchmark.score(answers)
    assert score.ids == ids[:2]
    assert named(score) == {
        "errors, not scored": [ids[3]],
        "pictures with one of two answers, not scored": ["existence/2"],
    }


def test_a_missing_question_is_an_error(tmp_path):
    folder(tmp_path)
    (tmp_path / "existence" / "2.txt").write_text("Is there a dog?\tYes\n")
    with pytest.raises(UsageError, match="1 pictures lack one of yes and no: existence/2"):
        Mme(tmp_path).items()
    (tmp_path / "existence" / "2.txt").write_text("Is there a dog? Yes\n")
    with pytest.raises(UsageError, match="expected `question<TAB>Yes or No`"):
        Mme(tmp_path).items()


def test_lines_as_lmms_eval_has_them(tmp_path):
    path = tmp_path / "mme.jsonl"
    rows = [
        {
            "question_id": "count/7.png",
            "category": "count",
            "question": f"{asked} Please answer yes or no.",
            "answer": a,
        }
        for asked, a in (("Are there two cats?", "Yes"), ("Are there three cats?", "No"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = Mme(path, suffix="\nAnswer the question using a single word or phrase.")
    assert [item.id for item in benchmark.items()] == ["count/7/1", "count/7/2"]
    logged = [{"id": "count/7.png", "prompt": row["question"] + " In a word.", "text": row["answer"]} for row in rows]
    assert benchmark.score(logged).figures()["count/score"] == 200
    path.write_text(json.dumps({"category": "count", "question": "Are there?", "answer": "maybe"}))
    with pytest.raises(UsageError, match="question 1 needs"):
        benchmark.items()


def test_made_from_a_coco_folder(tmp_path):
    benchmark = Mme(coco=write(tmp_path), pictures=3)
    items = benchmark.items()
    assert items == Mme(coco=tmp_path, pictures=3).items()
    prompts = {item.id: item.prompt for item in items}
    assert {item.truth["category"] for item in items} == {"existence", "count", "position"}
    assert sum(item.truth["category"] == "existence" for item in items) == 6
    assert all(prompt.endswith("? Please answer yes or no.") for prompt in prompts.values())
    right = [{"id": i.id, "text": i.truth["label"]} for i in items]
    assert benchmark.score(right).figures()["score"] == 600
    assert benchmark.label == "mme[built,official]"
    yes = benchmark.score([{"id": i.id, "text": "Yes"} for i in items]).figures()
    assert yes["existence/acc+"] == 0
    assert yes["yes_ratio"] == 100


def test_made_questions_follow_from_the_annotations(tmp_path):
    asked = {(i.image, i.prompt): i.truth["label"] for i in Mme(coco=write(tmp_path), suffix="").items()}
    counts = {k: v for k, v in asked.items() if "Are there" in k[1] or "only one" in k[1]}
    for (image, prompt), label in counts.items():
        if image == "000010.png" and "dogs" in prompt:
            assert (label == "yes") == ("two dogs" in prompt)
        elif "only one" in prompt and "dog" not in prompt:
            assert label == "yes"
    for (image, prompt), label in asked.items():
        if image == "000011.png" and "side" in prompt:
            order = ["dog", "cat", "car"]
            first, second = (order.index(prompt.rstrip("?").split()[i]) for i in (2, -1))
            assert (label == "yes") == ((first < second) == ("left" in prompt))


def test_one_source_of_questions():
    with pytest.raises(UsageError, match="one of the two"):
        Mme()
