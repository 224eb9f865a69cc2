import json

import pytest
from vlmfix.eval.benchmarks import vqa
from vlmfix.eval.benchmarks.vqa import Vqa

from vlmfix.errors import UsageError

from .coco_world import named


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two dogs.", "2 dogs"),
        ("A red, white and blue flag!", "red white and blue flag"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("dont know", "don't know"),
        ("left/right", "left right"),
        ("yes / no", "yes no"),
        ("None", "0"),
        ("\tthe  cat\n", "cat"),
        ("t-shirt", "t shirt"),
    ],
)
def test_normalisation(text, normal):
    assert vqa.normalise(text) == normal


def test_punctuation_and_its_inherited_slips():
    assert vqa.punctuation("a.b 3. 4.5") == "ab 3 4.5"
    assert vqa.punctuation("a.b 3. 4.5", repaired=True) == "ab 3. 4.5"
    assert vqa.punctuation("." * 40) == "." * 8  # a flag acts as a count of 32


@pytest.mark.parametrize(("same", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_over_annotators(same, value):
    answers = ["cat"] * same + ["dog"] * (10 - same)
    assert vqa.accuracy("The cat.", answers) == pytest.approx(value)


def test_files_of_vqa(tmp_path):
    asked = {"data_subtype": "val2014", "questions": [{"question_id": 9, "image_id": 42, "question": "What is it?"}]}
    said = {"annotations": [{"question_id": 9, "answers": [{"answer": "cat"}] * 10}]}
    (tmp_path / "q.json").write_text(json.dumps(asked))
    (tmp_path / "a.json").write_text(json.dumps(said))
    benchmark = Vqa(tmp_path / "q.json", tmp_path / "a.json")
    item = benchmark.items()[0]
    assert (item.id, item.image) == ("9", "COCO_val2014_000000000042.jpg")
    assert item.prompt == "What is it?\nAnswer the question using a single word or phrase."
    score = benchmark.score([{"id": 9, "text": "A cat"}])
    assert score.figures()["accuracy"] == 100
    assert score.details["9"] == {"accuracy": 1.0, "parsed": "cat"}
    with pytest.raises(UsageError, match="give the annotation file of the same split"):
        Vqa(tmp_path / "q.json").items()


def test_lines_and_exact_match(tmp_path):
    path = tmp_path / "gqa.jsonl"
    path.write_text(
        '{"id": "a", "image": "1.jpg", "question": "Colour?", "answer": "red"}\n'
        '{"id": "b", "image": "2.jpg", "question": "Side?", "answer": "left"}\n'
    )
    benchmark = Vqa(path, rule="exact", suffix="")
    score = benchmark.score([{"id": "a", "text": "Red."}, {"id": "b", "text": ""}, {"id": "c", "text": "x"}])
    assert score.figures() == {"accuracy": 50, "empty": 50}
    assert named(score) == {"answers whose id is not in the benchmark": ["c"], "empty answers": ["b"]}
    assert benchmark.label == "vqa[exact]"
    with pytest.raises(UsageError, match="unknown rule"):
        Vqa(path, rule="exakt")
