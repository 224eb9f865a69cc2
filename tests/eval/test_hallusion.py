import json

import pytest
from vlmfix.eval.benchmarks.hallusion import Hallusion

from vlmfix.errors import UsageError

from .coco_world import named


def row(kind, figure, asked, answer, picture=True):
    return {
        "category": kind,
        "subcategory": "chart",
        "visual_input": "1" if picture else "0",
        "set_id": "0",
        "figure_id": str(figure),
        "question_id": str(asked),
        "question": f"Question {asked}?",
        "gt_answer": str(answer),
        "gt_answer_details": "",
        "filename": f"./{kind}/chart/0_{figure}.png" if picture else None,
    }


@pytest.fixture
def path(tmp_path):
    rows = [
        row("VD", 0, 0, 1),
        row("VD", 1, 0, 0),
        row("VD", 0, 1, 0),
        row("VD", 1, 1, 0),
        row("VS", 0, 0, 1, picture=False),
        row("VS", 1, 0, 1),
    ]
    file = tmp_path / "HallusionBench.json"
    file.write_text(json.dumps(rows))
    return file


def test_groups_are_right_if_all_of_them_are(path):
    benchmark = Hallusion(path)
    items = benchmark.items()
    assert items[0].id == "VD/chart/0/0/0"
    assert items[0].image == "VD/chart/0_0.png"
    assert items[4].image == ""
    texts = ["Yes, it is.", "No", "no!", "Yes", "No", "Maybe"]
    score = benchmark.score([{"id": i.id, "text": t} for i, t in zip(items, texts, strict=True)])
    figures = score.figures()
    assert figures["aacc"] == pytest.approx(50)
    assert figures["qacc"] == pytest.approx(100 / 3)  # VD question 0 of VD 0, VD 1, VS 0
    assert figures["facc"] == pytest.approx(100 / 3)  # VD figure 0 of VD 0, VD 1, VS 1; VS 0 is no figure
    assert figures["aacc_vd"] == 75
    assert figures["unparsed"] == pytest.approx(100 / 6)
    assert named(score)["answers that are neither yes nor no, wrong"] == ["VS/chart/0/1/0"]
    assert set(score.clusters) == {"VD/chart/0", "VS/chart/0"}


def test_groups_with_a_missing_answer_are_left_out_and_named(path):
    benchmark = Hallusion(path, visual="pictures")
    items = benchmark.items()
    assert len(items) == 5
    answers = [{"id": i.id, "text": i.truth["label"]} for i in items[1:]]
    score = benchmark.score(answers)
    assert named(score) == {
        "items without an answer, not scored": ["VD/chart/0/0/0"],
        "groups with a missing answer, not scored": ["VD/chart/0/question 0"],
        "figures with a missing answer, not scored": ["VD/chart/0/figure 0"],
    }
    assert score.figures()["qacc"] == score.figures()["facc"] == 100


def test_parsers_by_name(path):
    items = Hallusion(path).items()
    answers = [{"id": i.id, "text": "Yes and no"} for i in items]
    assert Hallusion(path).score(answers).figures()["aacc"] == 0
    assert Hallusion(path, parser="contains").score(answers).figures()["aacc"] == 50
    assert Hallusion(path, parser="contains").label == "hallusion[all,contains]"
    with pytest.raises(UsageError, match="unknown name 'gpt'"):
        Hallusion(path, parser="gpt")


def test_broken_rows_are_refused(path):
    rows = json.loads(path.read_text())
    del rows[1]["set_id"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="row 2 needs set_id"):
        Hallusion(path).items()
