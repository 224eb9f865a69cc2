import json

import pytest
from vlmfix.eval.benchmarks import score_file
from vlmfix.eval.benchmarks.answers import pictures
from vlmfix.eval.benchmarks.files import Problems, read_objects
from vlmfix.eval.benchmarks.pope import Pope, published
from vlmfix.eval.importers import FORMATS, read_answers

from vlmfix.errors import UsageError

ROWS = {
    "vlmfix": ({"id": "a", "image": "a.jpg", "prompt": "?", "text": "Yes", "seconds": 1.5}, "a", "Yes"),
    "opera": ({"image_id": 42, "caption": "A dog."}, "42", "A dog."),
    "llava": ({"question_id": 7, "prompt": "?", "text": "No", "answer_id": "x", "model_id": "m"}, "7", "No"),
    "amber": ({"id": 12, "response": "No"}, "12", "No"),
    "pope": ({"question": "Is there?", "answer": "Yes"}, "1", "Yes"),
    "lmms-eval": (
        {"doc_id": 0, "doc": {"question_id": "5", "question": "Q"}, "resps": [["raw"]], "filtered_resps": ["Yes"]},
        "5",
        "Yes",
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("shape", ["lines", "array", "pretty"])
def test_every_format_is_recognised(tmp_path, name, shape):
    row, key, said = ROWS[name]
    path = tmp_path / "log"
    texts = {"lines": json.dumps(row) + "\n", "array": json.dumps([row]), "pretty": json.dumps(row, indent=2)}
    path.write_text(texts[shape])
    problems = Problems()
    (record,) = read_answers(path, problems)
    assert (record["id"], record["text"]) == (key, said)
    assert problems.kinds == {}
    assert read_answers(path, problems, name) == [record]


def test_what_a_record_keeps(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(ROWS["vlmfix"][0]))
    assert read_answers(path, Problems()) == [ROWS["vlmfix"][0]]
    path.write_text('{"id": 3, "error": "no picture"}')
    assert read_answers(path, Problems()) == [{"id": "3", "error": "no picture"}]
    path.write_text('{"question_id": 1, "image_id": 9, "prompt": "P", "text": "T"}')
    assert read_answers(path, Problems()) == [{"id": "1", "image": "9", "prompt": "P", "text": "T"}]
    assert FORMATS["pai"] is FORMATS["opera"]


@pytest.mark.parametrize(
    "said",
    [{"resps": [["Yes"]], "filtered_resps": ["Yes"]}, {"resps": ["Yes"], "filtered_resps": "Yes"}, {"resps": ["Yes"]}],
)
def test_lmms_eval_logs_reach_their_items(tmp_path, said):
    """Rows of lmms-eval count over all splits, and pictures go by their source."""
    image, asked, label = next(published("popular"))
    doc = {"question_id": "8999", "image_source": image.removesuffix(".jpg"), "question": asked, "answer": label}
    suffix = "\nAnswer the question using a single word or phrase."
    row = {"doc_id": 8999, "doc": doc, "target": label, "input": asked + suffix, **said}
    path = tmp_path / "samples_pope.jsonl"
    path.write_text(json.dumps(row) + "\n")
    score = score_file(path, "pope")
    assert score.ids == [Pope().items()[0].id]
    del row["input"]
    row["arguments"] = [asked + suffix, {"until": ["\n"]}]
    path.write_text(json.dumps(row) + "\n")
    (record,) = read_answers(path, Problems())
    assert record["prompt"] == asked + suffix


def test_an_lmms_eval_row_without_response_is_no_answer(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"doc_id": 1, "doc": {}, "filtered_resps": []}\n{"doc_id": 2, "doc": {}, "filtered_resps": ["a"]}')
    score = score_file(path, "text")
    assert score.ids == ["2"]
    assert score.details["problems"] == {"records without text": ["1"], "items without an answer, not scored": ["1"]}


def test_other_rows_and_broken_lines_are_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"image_id": 1, "caption": "A dog."}\n{"image_id": 2}\n{"image_id": 3, "cap\n[1]\n\n')
    problems = Problems()
    assert len(read_answers(path, problems)) == 1
    assert problems.kinds == {
        "malformed JSON lines": ["log.jsonl:3", "log.jsonl:4"],
        "rows that are no opera answers": ["log.jsonl row 2"],
    }
    assert problems.lines()[0] == "2 malformed JSON lines: log.jsonl:3, log.jsonl:4"


def test_broken_pretty_printed_objects_are_named(tmp_path):
    good = json.dumps({"image_id": 1, "caption": "A {dog}."}, indent=2)
    path = tmp_path / "log.json"
    path.write_text(good + "\n" + '{\n "image_id": 2,\n "caption": \n}\n' + good.replace("1", "3"))
    problems = Problems()
    assert [r["id"] for r in read_answers(path, problems)] == ["1", "3"]
    assert problems.kinds == {"malformed JSON objects": ["log.json:5"]}


def test_files_that_hold_no_answers_are_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(UsageError, match="no such file"):
        read_answers(path, Problems())
    path.write_text("")
    with pytest.raises(UsageError, match="holds no JSON object"):
        read_answers(path, Problems())
    path.write_text('{"a": 1, "b": 2}')
    with pytest.raises(UsageError, match="keys a, b, no known answer format"):
        read_answers(path, Problems())
    with pytest.raises(UsageError, match=r"no row of .* is an answer in the format llava"):
        read_answers(path, Problems(), "llava")
    with pytest.raises(UsageError, match="did you mean lmms-eval"):
        read_answers(path, Problems(), "lmms_eval")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_answers(path, Problems())
    with pytest.raises(UsageError, match="is a folder"):
        read_objects(tmp_path, Problems())


def test_long_lists_of_problems_are_shortened_in_print_only():
    problems = Problems()
    for number in range(30):
        problems.add("empty answers", number)
    assert problems.lines(3) == ("30 empty answers: 0, 1, 2 and 27 more",)
    assert len(problems.kinds["empty answers"]) == 30


def test_pictures_are_found_or_named(tmp_path):
    items = Pope(splits="random").items()[:18:6]
    names = [item.image for item in items]
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / names[0]).write_bytes(b"")
    (tmp_path / "val2014" / names[1].replace("COCO_val2014_", "").replace(".jpg", ".png")).write_bytes(b"")
    problems = Problems()
    found = pictures(items, tmp_path, problems)
    assert list(found) == names[:2]
    assert problems.kinds == {"missing pictures": [names[2]]}
