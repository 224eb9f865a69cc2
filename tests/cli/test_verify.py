"""`vlmfix verify` finds what was changed in a bundle; the whole way is in test_eval.py."""

import json
import zipfile

import pytest
from vlmfix.eval import bundle, scenes
from vlmfix.eval.baselines import GREEDY
from vlmfix.eval.benchmarks import load
from vlmfix.eval.collect import Answered


@pytest.fixture
def made(tmp_path):
    folder = scenes.build(tmp_path / "scenes", 3)
    items = load("chair", truth=folder).items()
    records = [{"id": item.id, "prompt": item.prompt, "text": "A dog and a car."} for item in items]
    rows = [Answered(GREEDY.name, GREEDY.kind, [records], [], items)]
    return bundle.write(tmp_path / "out.zip", "chair", {"truth": str(folder)}, rows)


def test_a_sound_bundle_agrees(vlmfix_says, made):
    said = vlmfix_says("verify", made)
    assert said.exit_code == 0
    assert "everything agrees" in said.stderr
    assert "greedy" in said.stdout


def test_changed_answers_are_found(vlmfix_says, made, tmp_path):
    forged = tmp_path / "forged.zip"
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(forged, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"A dog and a car.", b"Nothing."))
    said = vlmfix_says("verify", forged, "--json")
    assert said.exit_code == 1
    found = json.loads(said.stdout)
    assert found["ok"] is False
    assert any("was changed" in problem for problem in found["problems"])
    assert any("scored again" in problem for problem in found["problems"])


def test_other_files_are_wrong_usage(vlmfix_says, tmp_path):
    (tmp_path / "x.zip").write_text("no zip")
    said = vlmfix_says("verify", tmp_path / "x.zip")
    assert said.exit_code == 2
    assert "is no bundle" in said.stderr
