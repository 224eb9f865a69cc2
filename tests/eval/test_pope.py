import math

import numpy as np
import pytest
from vlmfix.eval import stats
from vlmfix.eval.benchmarks import load, margins, pope, score_file
from vlmfix.eval.benchmarks.files import Problems
from vlmfix.eval.benchmarks.pope import Pope

from vlmfix.errors import UsageError

from .coco_world import named, sums, write


def right_answers(benchmark, **extra):
    return [{"id": i.id, "text": i.truth["label"].capitalize(), **extra} for i in benchmark.items()]


def test_the_three_splits_share_their_questions():
    items = Pope().items()
    assert len(items) == 5127
    assert sum(len(rows) for item in items for rows in item.truth["rows"].values()) == 9000
    assert {item.image for item in items} == {item.image for item in Pope(splits="random").items()}


def test_right_answers_score_100_in_every_split_and_parser():
    score = Pope().score(right_answers(Pope()))
    figures = score.figures()
    assert figures["f1"] == figures["random/accuracy"] == figures["adversarial/precision"] == 100
    assert figures["f1[strict]"] == figures["accuracy[lmms_eval]"] == 100
    assert figures["yes_ratio"] == 50
    assert figures["unparsed"] == 0
    assert next(iter(score.metrics)) == "f1"
    assert score.problems == ()
    assert sums(score)["adversarial/items"] == 3000


def test_parsers_disagree_on_the_same_answers():
    benchmark = Pope(splits="random")
    answers = [{"id": item.id, "text": "There isn't one."} for item in benchmark.items()]
    figures = benchmark.score(answers).figures()
    assert figures["accuracy"] == 50  # official: yes to everything
    assert figures["yes_ratio"] == 100
    assert figures["accuracy[opera_pai]"] == 50
    assert figures["yes_ratio[opera_pai]"] == 0
    assert figures["f1[opera_pai]"] == figures["precision[opera_pai]"] == 0  # no positive answer: 0, not nan
    assert figures["accuracy[strict]"] == figures["accuracy[vcd]"] == 0
    assert figures["unparsed"] == 100


def test_headline_parser_is_chosen_by_name():
    benchmark = Pope(splits="random", parser="opera_pai")
    figures = benchmark.score([{"id": i.id, "text": "NO"} for i in benchmark.items()]).figures()
    assert (figures["yes_ratio"], figures["yes_ratio[official]"]) == (0, 100)
    assert benchmark.label == "pope[coco,opera_pai]"


@pytest.mark.parametrize("options", [{"splits": "randon"}, {"parser": "offical"}, {"source": "gga"}, {"source": "gqa"}])
def test_wrong_names_are_refused(options):
    with pytest.raises(UsageError, match=r"did you mean|known|not shipped"):
        Pope(**options)


def test_load_checks_options():
    assert load("pope", splits="popular, random", seed="3").seed == 3
    with pytest.raises(UsageError, match="did you mean splits"):
        load("pope", split="random")
    with pytest.raises(UsageError, match="whole number"):
        load("pope", seed="x")
    with pytest.raises(UsageError, match="needs truth"):
        load("chair")


def test_question_files_as_lines_and_as_array(tmp_path):
    rows = '{"question_id":1,"image":"a.jpg","text":"Is there an apple in the imange?","label":"yes"}'
    other = '{"question_id":2,"image":"a.jpg","text":"Is there a dog in the image?","label":"No"}'
    (tmp_path / "gqa_pope_seem_random.json").write_text(f"[{rows},\n{other}]")
    (tmp_path / "gqa_pope_seem_popular.json").write_text(f"{rows}\n{other}\n")
    benchmark = Pope(splits="random,popular", source="gqa", questions=tmp_path)
    assert [item.id for item in benchmark.items()] == ["a:apple", "a:dog"]
    assert benchmark.items()[0].prompt == "Is there an apple in the image?"
    score = benchmark.score(right_answers(benchmark))
    assert score.figures()["popular/accuracy"] == 100
    kinds = named(score)
    assert kinds["questions with the misprint `imange`, mended"] == [
        "gqa_pope_seem_random.json:1",
        "gqa_pope_seem_popular.json:1",
    ]


def test_bad_question_files_are_refused(tmp_path):
    path = tmp_path / "random.json"
    path.write_text('{"image":"a.jpg","text":"Is there a dog in the image?"}')
    with pytest.raises(UsageError, match="question 1 needs"):
        Pope(splits="random", questions=path).items()
    both = '{{"image":"a.jpg","text":"Is there a dog in the image?","label":"{}"}}\n'
    path.write_text(both.format("yes") + both.format("no"))
    with pytest.raises(UsageError, match="both labels"):
        Pope(splits="random", questions=path).items()
    with pytest.raises(UsageError, match="one split"):
        Pope(questions=path).items()
    with pytest.raises(UsageError, match="0 files named after"):
        Pope(splits="popular", questions=tmp_path).items()


def test_old_file_of_2910_rows_is_named(tmp_path):
    path = tmp_path / "random.json"
    row = '{{"image":"{}.jpg","text":"Is there a dog in the image?","label":"yes"}}\n'
    path.write_text("".join(row.format(n) for n in range(2910)))
    problems = Problems()
    Pope(splits="random", questions=path).items(problems)
    assert any("2,910" in line for line in problems.lines())


def test_built_from_coco_annotations(tmp_path, capsys):
    benchmark = Pope(coco=write(tmp_path))
    items = benchmark.items()
    assert capsys.readouterr().out == ""  # pycocotools prints
    assert {item.image for item in items} == {f"{n:06d}.png" for n in range(10, 15)}  # one picture has too few objects
    for item in items:
        assert set(item.truth["rows"]) <= set(pope.SPLITS)
    assert items == Pope(coco=tmp_path).items()
    assert benchmark.score(right_answers(benchmark)).figures()["f1"] == 100
    assert benchmark.label == "pope[built,official]"
    few = Pope(coco=tmp_path, pictures=2, per_picture=1, splits="popular")
    assert len({item.image for item in few.items()}) == 2
    with pytest.raises(UsageError, match="no picture has 7 distinct objects"):
        Pope(coco=tmp_path, per_picture=7).items()


def test_a_pair_asked_twice_is_one_item_that_counts_twice(tmp_path):
    path = tmp_path / "gqa_adversarial.json"
    row = '{{"image":"a.jpg","text":"Is there a {} in the image?","label":"{}"}}\n'
    path.write_text(row.format("dog", "yes") * 2 + row.format("cat", "no"))
    benchmark = Pope(splits="adversarial", source="gqa", questions=path)
    assert len(benchmark.items()) == 2
    figures = benchmark.score([{"id": "a:dog", "text": "Yes"}, {"id": "a:cat", "text": "Yes"}]).figures()
    assert figures["accuracy"] == pytest.approx(100 * 2 / 3)


def test_builder_by_hand():
    pictures = [("a", ["dog", "cat"]), ("b", ["dog", "cup"]), ("c", ["cup", "cat"]), ("d", ["dog", "kite"])]
    popular = list(pope.build(pictures, "popular", 1))
    # counts: dog 3, cat 2, cup 2, kite 1
    assert [text for _, text, label in popular if label == "no"] == [
        "Is there a cup in the image?",
        "Is there a cat in the image?",
        "Is there a dog in the image?",
        "Is there a cat in the image?",
    ]
    adversarial = list(pope.build(pictures, "adversarial", 1))
    # with dog: cat, cup, kite once each; with cup: dog, cat
    assert [text for _, text, label in adversarial if label == "no"][2] == "Is there a dog in the image?"
    with pytest.raises(UsageError, match="too few"):
        list(pope.build([("a", ["dog"])], "random", 1))
    assert pope.question("apple") == "Is there an apple in the image?"


def test_problems_are_counted_and_named():
    benchmark = Pope(splits="random")
    answers = right_answers(benchmark)
    first, second, third, fourth, fifth, sixth, seventh = (answers[i]["id"] for i in range(7))
    answers[1] = {"id": second, "error": "out of memory"}
    answers[2]["text"] = ""
    answers[3]["text"] = "Nein"
    answers[4] = {"id": fifth, "text": None}
    del answers[5]
    answers += [{"id": first, "text": "No"}, {"id": seventh, "text": answers[5]["text"]}, {"id": "x:y", "text": "No"}]
    score = benchmark.score(answers)
    assert named(score) == {
        "repeated answers that differ, the first counts": [first],
        "repeated answers": [seventh],
        "records without text": [fifth],
        "answers whose id is not in the benchmark": ["x:y"],
        "errors, not scored": [second],
        "items without an answer, not scored": [fifth, sixth],
        "empty answers": [third],
        "answers that seem not to be English": [fourth],
        "answers with neither or both of yes and no": [third, fourth],
    }
    assert len(score.ids) == 2997
    assert second not in score.ids
    assert score.figures()["empty"] == pytest.approx(100 / 2997)
    assert any(line.startswith("1 errors, not scored:") for line in score.problems)


def test_an_error_answered_on_retry_is_no_problem():
    benchmark = Pope(splits="random")
    answers = right_answers(benchmark)
    score = benchmark.score([{"id": answers[0]["id"], "error": "x"}, *answers])
    assert score.problems == ()


def test_answers_of_another_benchmark_are_refused():
    with pytest.raises(UsageError, match="none of the 2 answers belongs to an item: answers are called '1', '2'"):
        Pope().score([{"id": 1, "text": "Yes"}, {"id": 2, "text": "No"}])


def test_row_numbers_name_rows_of_one_split():
    rows = list(pope.published("popular"))
    records = [{"id": n, "text": label} for n, (_, _, label) in enumerate(rows, 1)]
    score = Pope(splits="popular").score(records)
    assert score.figures()["accuracy"] == 100
    assert sums(score)["popular/items"] == 3000


def test_picture_and_question_name_an_item():
    item = Pope().items()[0]
    record = {"id": 77, "image": item.image, "prompt": f"USER: {item.prompt} Answer:", "text": "Yes"}
    assert Pope().score([record]).ids == [item.id]


def test_auroc_and_best_offset():
    rng = np.random.default_rng(0)
    benchmark = Pope(splits="random")
    items = benchmark.items()
    yes = np.array([item.truth["label"] == "yes" for item in items])
    margin = np.round(rng.normal(size=len(items)) + 1.5 * yes + 0.7, 1)  # ties, and a shifted threshold
    records = [
        {"id": i.id, "text": "Yes" if m > 0 else "No", "margin": float(m)} for i, m in zip(items, margin, strict=True)
    ]
    score = benchmark.score(records)
    figures = score.figures()
    pairs = margin[yes][:, None] - margin[~yes][None]
    assert figures["auroc"] == pytest.approx(100 * ((pairs > 0).mean() + (pairs == 0).mean() / 2))
    tried = [((margin > t) == yes).mean() for t in np.arange(-6, 8, 0.05)]
    assert figures["best_accuracy"] == pytest.approx(100 * max(tried))
    assert ((margin > figures["best_offset"]) == yes).mean() == pytest.approx(max(tried))
    assert 1 < figures["best_offset"] < 2
    assert figures["best_accuracy"] > figures["accuracy"] + 3
    some = stats.interval(score, draws=400)["auroc"]
    assert some.low < figures["auroc"] < some.high
    hand = hanley(yes, margin)
    assert 0.7 < some.sd / hand < 1.4


def hanley(yes, margin):
    """Standard error of the AUROC by DeLong's formula, in percent."""
    pairs = margin[yes][:, None] - margin[~yes][None]
    wins = (pairs > 0) + (pairs == 0) / 2
    return 100 * math.sqrt(wins.mean(1).var(ddof=1) / yes.sum() + wins.mean(0).var(ddof=1) / (~yes).sum())


def test_margins_are_all_or_none():
    benchmark = Pope(splits="random")
    answers = right_answers(benchmark, margin=1.0)
    del answers[0]["margin"]
    score = benchmark.score(answers)
    assert "auroc" not in score.metrics
    assert named(score)["answers without a margin, so no AUROC"] == [answers[0]["id"]]
    with_margins = benchmark.score(right_answers(benchmark, margin=1.0))
    assert list(score.columns) == list(with_margins.columns)  # so that the two can be compared


@pytest.mark.parametrize(
    ("margin", "yes", "low", "high"),
    [([1, 2, 3, 4], [0, 0, 1, 1], 2, 3), ([-2, -1, 1, 2], [0, 0, 1, 1], 0, 0), ([1, 2], [1, 1], 0, 0)],
)
def test_best_offset_by_hand(margin, yes, low, high):
    assert low <= margins.best_offset(np.array(margin, float), np.array(yes, bool)) <= high


def test_score_file_reads_a_llava_log(tmp_path):
    rows = list(pope.published("random"))
    path = tmp_path / "log.jsonl"
    line = '{{"question_id": {}, "prompt": "{}", "text": "{}", "model_id": "m", "metadata": {{}}}}\n'
    path.write_text("".join(line.format(n, asked, label) for n, (_, asked, label) in enumerate(rows, 1)) + "{oops\n")
    score = score_file(path, "pope", splits="random")
    assert score.figures()["accuracy"] == 100
    assert named(score) == {"malformed JSON lines": ["log.jsonl:3001"]}
