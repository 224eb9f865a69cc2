"""`vlmfix tune` on the tuning split and on a user's own questions."""

import json

import pytest
from vlmfix.eval import scenes

GRIDS = '["vcd"]\nalpha = [0.5, 1.5]\n["pai"]\nalpha = [0.2, 0.5]\n'


@pytest.fixture
def grids(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFIX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "grids.toml"
    path.write_text(GRIDS)
    return path


def test_the_tuning_split_gives_a_preset(vlmfix_says, grids, tmp_path):
    said = vlmfix_says(
        "tune", grids, "--images", "scenes:tuning:3", "-b", "pope", "-O", "splits=random", "--rounds", 2,
        "--keep-recall", 100, "-o", tmp_path / "tuned", "--json",
    )  # fmt: skip
    assert said.exit_code == 1  # three pictures tell nothing
    found = json.loads(said.stdout)
    assert {entry["recipe"].partition("(")[0] for entry in found["presets"]} == {"vcd", "pai"}
    assert all(entry["n_candidates"] == 2 for entry in found["presets"])
    assert {entry["tuned_on"]["split"] for entry in found["presets"]} == {"tuning"}
    assert len(found["notes"]) == 2
    assert json.loads((tmp_path / "tuned" / "preset.json").read_text())["presets"] == found["presets"]


def test_the_test_split_is_refused(vlmfix_says, grids, tmp_path):
    for extra in ([], ["--split", "tuning"]):  # what the annotations say counts
        said = vlmfix_says("tune", grids, "--images", "scenes:test:3", "-o", tmp_path / "no", *extra)
        assert said.exit_code == 2
        assert "items of the split 'test' cannot be tuned on" in said.stderr
    assert not (tmp_path / "no").exists()


def test_a_slip_in_a_recipe_shows_before_anything_is_answered(vlmfix_says, fake_model, grids, tmp_path):
    for recipe, setting, message in (
        ("vdc", "alpha", "unknown method 'vdc'; did you mean vcd"),
        ("vcd", "alhpa", "vcd has no setting 'alhpa'; did you mean alpha"),
    ):
        grids.write_text(f"[pai]\nalpha = [0.5]\n[{recipe}]\n{setting} = [1.0]\n")
        said = vlmfix_says("tune", grids, "--images", "scenes:tuning:3", "-o", tmp_path / "no")
        assert said.exit_code == 2
        assert message in said.stderr
    assert fake_model == []
    assert not (tmp_path / "no").exists()


def test_own_questions_and_a_word_on_their_number(vlmfix_says, grids, tmp_path):
    folder = scenes.build(tmp_path / "mine", 2, "demo") / "images"
    rows = [f"{number:06d}.png,Is there a {name} in the image?,{label}" for number in (0, 1)
            for name, label in (("dog", "no"), ("car", "no"), ("cup", "yes"))]  # fmt: skip
    path = folder / "mine.csv"
    path.write_text("image,question,answer\n" + "\n".join(rows) + "\n")
    said = vlmfix_says("tune", grids, "--questions", path, "--rounds", 1, "--keep-recall", 100, "-o", tmp_path / "own")
    assert said.exit_code == 1
    assert "are too few" in said.stderr
    assert "chosen settings" in said.stderr
    (tmp_path / "grids.toml").write_text("[vcd]\nalpha = 1\n")
    said = vlmfix_says("tune", grids, "--questions", path)
    assert said.exit_code == 2
    assert "must hold lists of values" in said.stderr
