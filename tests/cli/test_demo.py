"""`vlmfix demo`: what it marks and sums up is what the annotations say."""

import json

import pytest

from vlmfix.commands.demo import marked

from . import fake

SAYS = "Yes, a book and a fork."


@pytest.fixture
def talker(fake_model, monkeypatch, tmp_path):
    """Every picture shows a book and a fork, says the model; run away from the checkout's pictures."""
    import vlmfix.commands.demo

    monkeypatch.setattr(fake, "_see", lambda image: SAYS)
    monkeypatch.setattr(vlmfix.commands.demo, "EXAMPLES", tmp_path / "none")
    return tmp_path / "demo"


def truth(folder):
    """Per picture the categories in it."""
    data = json.loads((folder / "scenes" / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = {image["id"]: set() for image in data["images"]}
    for annotation in data["annotations"]:
        found[annotation["image_id"]].add(names[annotation["category_id"]])
    return found


def test_figures(vlmfix_says, talker):
    result = vlmfix_says("demo", "--out", talker, "--methods", "greedy; var", "--json")
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)["recipes"]
    pictures = truth(talker)
    wrong = [len({"book", "fork"} - objects) for objects in pictures.values()]
    for row in figures.values():
        assert row["chair_s"] == pytest.approx(100 * sum(w > 0 for w in wrong) / len(wrong))
        assert row["chair_i"] == pytest.approx(100 * sum(wrong) / (2 * len(wrong)))
        assert row["yes_ratio"] == 100
        assert row["accuracy"] == 50
    records = [json.loads(line) for line in (talker / "answers.jsonl").read_text().splitlines()]
    assert len(records) == 2 * (len(pictures) + 2 * len(pictures))


def test_screen(vlmfix_says, talker):
    text = vlmfix_says("demo", "--out", talker, "--methods", "greedy", "--show", 24).stdout
    for number, objects in truth(talker).items():
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{number:06d}.png: "))
        for word in ("book", "fork"):
            assert (f"!{word}!" in lines[at + 1]) == (word not in objects)
    assert "24 captions, 48 yes/no questions" in text


def test_marks():
    spans = [{"start": 2, "end": 5, "hallucinated": False}, {"start": 12, "end": 16, "hallucinated": True}]
    assert marked("a cat and a fork.", spans, coloured=False).plain == "a cat and a !fork!."
    coloured = marked("a cat and a fork.", spans, coloured=True)
    assert coloured.plain == "a cat and a fork."
    assert [(span.start, span.end, str(span.style)) for span in coloured.spans] == [
        (2, 5, "green"),
        (12, 16, "bold red"),
    ]
