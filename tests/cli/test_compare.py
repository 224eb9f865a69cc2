"""`vlmfix compare`: the same question under several recipes, with what changed."""

import json

import pytest

from vlmfix.commands.compare import changes


def test_changes_rebuild_both_texts():
    before, after = "a cat and a dog on the mat", "a cat on the red mat"
    runs = changes(before, after)
    assert runs == [("same", "a cat"), ("gone", "and a dog"), ("same", "on the"), ("new", "red"), ("same", "mat")]
    assert " ".join(run for kind, run in runs if kind != "new") == before
    assert " ".join(run for kind, run in runs if kind != "gone") == after


def test_compare(vlmfix_says, fake_model, photos):
    result = vlmfix_says("compare", photos / "3.png", "What is {it}?", "--methods", "greedy; var; vcd(alpha=2)")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "greedy  5 tokens, 0.10 s"
    assert lines[1].strip() == "greedy sees 3x9"
    assert lines[3].strip() == "[-greedy-] {+var+} sees 3x9"
    assert lines[4].startswith("vcd(alpha=2)")


def test_an_empty_prompt_is_refused(vlmfix_says, fake_model, photos):
    result = vlmfix_says("compare", photos / "1.png", " ")
    assert result.exit_code == 2
    assert "the prompt is empty" in result.stderr
    assert fake_model == []


def test_compare_as_json_with_a_refusal(vlmfix_says, fake_model, photos):
    result = vlmfix_says("compare", photos / "3.png", "?", "--methods", "greedy; m3id", "--json")
    assert result.exit_code == 1
    greedy, refused = json.loads(result.stdout)
    assert greedy["changes"] == [["same", "greedy sees 3x9"]]
    assert "m3id cannot act here" in refused["error"]
    assert "text" not in refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["gone.png", "?"], "no such file"), (["{photos}/1.png", "?", "--methods", " ; "], "empty recipe")],
)
def test_wrong_usage(vlmfix_says, fake_model, photos, arguments, words):
    result = vlmfix_says("compare", *(argument.format(photos=photos) for argument in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert not fake_model
