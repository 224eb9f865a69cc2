import pytest
from vlmfix.eval.benchmarks import score_file, text
from vlmfix.eval.benchmarks.text import Text

from .coco_world import named


def test_quality_by_hand():
    row = text.quality("A dog. A dog.  A cat!")
    assert row["tokens"] == 6
    assert row["words"] == 7  # pieces between single blanks, one of them empty
    assert (row["grams_2"], row["distinct_2"]) == (5, 3)  # a dog, dog a, a dog, dog a, a cat
    assert row["rep_2"] == pytest.approx(2 / 5)
    assert row["repeated"] == pytest.approx(1 / 3)
    empty = text.quality("")
    assert empty["empty"] == 1
    assert empty["words"] == empty["rep_4"] == empty["variety_4"] == 0


def test_loops_and_short_answers():
    loop = Text().score([{"id": "1", "text": "The cat sat on the mat. " * 20}]).figures()
    assert next(iter(loop)) == "rep_4"
    assert loop["rep_4"] > 90
    assert loop["repeated_sentences"] == 95
    short = Text().score([{"id": "1", "text": "cat"}]).figures()
    assert short["rep_4"] == short["distinct_4_macro"] == 0


def test_answers_at_the_token_limit_are_counted():
    answers = [{"id": "1", "text": "a", "tokens": 64}, {"id": "2", "text": "b", "tokens": 9}, {"id": "3", "text": "c"}]
    assert Text(max_new_tokens=64).score(answers).figures()["cut"] == pytest.approx(100 / 3)
    assert "cut" not in Text().score(answers).metrics


def test_problems_are_named():
    score = Text().score([{"id": "1", "text": ""}, {"id": "1", "text": "b"}, {"id": "2", "error": "x"}, {"text": "a"}])
    assert named(score) == {
        "repeated answers that differ, the first counts": ["1"],
        "answers whose id is not in the benchmark": ["record 4"],
        "errors, not scored": ["2"],
        "empty answers": ["1"],
    }


def test_bleu_against_files(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"id": "1", "text": "a small dog sits here"}\n')
    (tmp_path / "two.jsonl").write_text('{"id": "1", "text": "the dog sits there"}\n')
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "1", "text": "the small dog sits"}\n{"id": "2", "text": "x"}\n')
    score = score_file(answers, "text", references=[tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    figures = score.figures()
    assert figures["bleu_1"] == pytest.approx(
        1
    )  # the, small, dog, sits: all in one of the two, length 4 is closest to 4
    assert figures["bleu_2"] == pytest.approx((4 / 4 * 2 / 3) ** 0.5)
    assert named(score) == {"answers without a reference, not scored": ["2"]}


def test_bleu_punishes_short_answers():
    row = text.bleu_counts("a dog", ["a dog sits here"])
    assert float(text.bleu(row, 1)) == pytest.approx(2.718281828 ** (1 - 4 / 2), rel=1e-6)
    tie = text.bleu_counts("a b c", ["a b", "a b c d"])
    assert tie["reference"] == 2
