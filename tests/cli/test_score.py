"""`vlmfix score` needs no model and names what it did not score."""

import json
import subprocess
import sys

import pytest
from vlmfix.eval import benchmarks, scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scenes.build(tmp_path_factory.mktemp("scenes"), 6)


@pytest.fixture
def answers(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    items = benchmarks.load("chair", truth=folder).items()
    lines = []
    for recipe, said in (("greedy", "a zebra and a {}"), ("var", "a {}")):
        for item in items[: 6 if recipe == "greedy" else 5]:
            text = said.format(item.truth["objects"][0])
            lines.append({"id": item.id, "recipe": recipe, "text": text, "prompt": item.prompt, "image": item.image})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return path


def test_recipes_are_scored_apart_and_flaws_named(vlmfix_says, folder, answers):
    said = vlmfix_says("score", answers, "-b", "chair", "--truth", folder, "-O", "scorer=corrected", "--json")
    assert said.exit_code == 1  # a broken line, a missing answer
    greedy, var = json.loads(said.stdout)["results"]
    assert (greedy["recipe"], greedy["items"], var["items"]) == ("greedy", 6, 5)
    assert greedy["figures"]["chair_s"]["value"] > var["figures"]["chair_s"]["value"] == 0
    assert greedy["figures"]["chair_s"]["high"] >= greedy["figures"]["chair_s"]["value"]
    assert any("line" in kind for kind in greedy["problems"])
    said = vlmfix_says("score", answers, "-b", "chair", "--truth", folder)
    assert "chair_i" in said.stdout
    assert "var, 5 items on 5 pictures" in said.stdout
    assert "answers.jsonl:12" in said.stderr


def test_no_torch_is_imported(folder, answers):
    code = (
        "import sys\nfrom vlmfix.commands import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    sys.exit(9 if 'torch' in sys.modules else end.code)"
    )
    command = [sys.executable, "-c", code, "score", answers, "-b", "chair", "--truth", folder]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-b", "chairs"], "unknown benchmark 'chairs'; did you mean chair"),
        (["-b", "chair"], "chair needs truth"),
        (["-b", "vqa", "--truth", "x"], "vqa takes no COCO annotations"),
        (["-b", "chair", "--truth", "scenes:none"], "no split 'none'"),
        (["-b", "pope"], "none of the"),
    ],
)
def test_wrong_usage_is_named(vlmfix_says, answers, arguments, message):
    said = vlmfix_says("score", answers, *arguments)
    assert said.exit_code == 2
    assert message in said.stderr
