"""`vlmfix eval`, `frontier` and `bench`, end to end on the bundled model with a few drawn pictures."""

import json
import subprocess
import sys

import pytest
from vlmfix.eval import packed

SCENES = "scenes:test:4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("VLMFIX_CACHE", str(place / "cache"))


def answered(vlmfix_says, place):
    """A small table; asked for again, its answers are read back."""
    out, zipped = place / "run", place / "all.zip"
    return out, vlmfix_says(
        "eval", SCENES, "--methods", "vcd", "--limit", 3, "--batch-size", 4, "-o", out, "--bundle", zipped, "--json"
    )


def test_a_table_from_answers_to_bundle(vlmfix_says, place):
    out, said = answered(vlmfix_says, place)
    assert said.exit_code == 0, said.stderr
    tables = json.loads(said.stdout)
    assert set(tables) == {"chair", "pope"}
    names = ["greedy", "sampling", "sampling + mask: vcd(alpha=0)", "vcd"]
    assert [line["name"] for line in tables["chair"]["lines"]] == names
    greedy = tables["pope"]["lines"][0]["cells"]
    assert greedy["auroc"]["value"] is not None  # margins were recorded
    assert greedy["prefill_ms"]["value"] > 0
    assert tables["chair"]["lines"][3]["cells"]["extra_rows"]["value"] == 1
    for name in ("chair", "pope"):
        assert "| vcd | method | ref-run |" in (out / name / "table.md").read_text()
        checked = vlmfix_says("verify", place / f"all-{name}.zip", "--json")
        assert checked.exit_code == 0, checked.stdout
        assert json.loads(checked.stdout)["checked"]["answers"] == 12


def test_stored_and_packed_answers_give_the_same_table_without_a_model(vlmfix_says, place):
    other = place / "other"
    out, _ = answered(vlmfix_says, place)
    first = json.loads((out / "chair" / "table.json").read_text())
    files = packed.pack(out / "answers", place / "packed")
    assert packed.unpack(files, other / "answers") == 8
    assert packed.unpack(files, other / "answers") == 0
    said = vlmfix_says("eval", SCENES, "--methods", "vcd; var", "--limit", 3, "-o", other, "--stored", "--json")
    assert said.exit_code == 1  # var was never answered
    again = json.loads(said.stdout)["chair"]
    assert [line["name"] for line in again["lines"]] == [line["name"] for line in first["lines"]]
    for old, new in zip(first["lines"], again["lines"], strict=True):
        assert old["cells"]["chair_i"] == new["cells"]["chair_i"]
    assert any("not in the table, var: no answers" in note for note in again["notes"])
    said = vlmfix_says("eval", "scenes:test:5", "--limit", 3, "-o", other, "--stored")
    assert said.exit_code == 2
    assert "answers other questions" in said.stderr


def test_a_stopped_run_goes_on(vlmfix_says, place):
    arguments = ("eval", "chair", "--images", SCENES, "--batch-size", 1, "-o", place / "stopped")
    said = vlmfix_says(*arguments, "--answers-only", "--seconds", 1)
    assert said.exit_code == 1
    assert "out of time; the same command goes on" in said.stderr
    (store,) = (place / "stopped" / "answers").iterdir()
    assert 1 <= sum(len(path.read_text().splitlines()) for path in store.glob("*.jsonl")) < 4
    said = vlmfix_says(*arguments, "--add", f"them={place / 'theirs.jsonl'}")
    assert said.exit_code == 2
    assert "theirs.jsonl does not exist" in said.stderr
    assert vlmfix_says(*arguments, "--answers-only").exit_code == 0
    said = vlmfix_says(*arguments, "--stored")
    assert said.exit_code == 0
    assert "4 items on 4 pictures" in said.stdout
    assert "guards and cost" in said.stdout


def test_an_estimate_stores_nothing(vlmfix_says, place):
    said = vlmfix_says("eval", "pope", "--images", SCENES, "--limit", 2, "-o", place / "dry", "--dry-run", "--json")
    (row,) = json.loads(said.stdout)["rows"]
    assert row["items"] == 2
    assert row["seconds_per_item"] > 0
    assert not (place / "dry").exists()


def test_rows_that_cannot_act_are_named_and_the_others_go_on(vlmfix_says, place):
    said = vlmfix_says(
        "eval", "pope", "--images", SCENES, "--limit", 2, "-o", place / "refused", "--methods", "var(sink_dims=[9999])",
        "--controls", "placebo", "-O", "splits=random", "--json",
    )  # fmt: skip
    assert said.exit_code == 2  # a wrong value is the user's to mend
    said = vlmfix_says(
        "eval", "pope", "--images", SCENES, "--limit", 2, "-o", place / "refused", "--methods", "pai",
        "--controls", "placebo", "-O", "splits=random", "--json",
    )  # fmt: skip
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)["pope"]
    assert [line["name"] for line in found["lines"]] == ["greedy", "pai", "pai [placebo: text-keys]"]
    assert any("pai [placebo: heads]: " in note and "all heads alike" in note for note in found["notes"])
    assert "random/f1" not in found["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["popes"], "unknown benchmark 'popes'; did you mean pope"),
        (["scenes:tests"], "no split 'tests'; did you mean test"),
        (["scenes:test:many"], "names no scenes"),
        (["vqa", "--images", "scenes"], "the benchmark vqa cannot be made of scenes"),
        (["chair", "--images", SCENES, "-O", "scorers=corrected"], "no such option; did you mean scorer"),
        (["chair", "--images", SCENES, "-O", "scorer"], "write KEY=VALUE"),
        (["chair", "--images", SCENES, "--controls", "placebos"], "unknown control 'placebos'"),
        (["chair", "--images", SCENES, "--dry-run", "--stored"], "exclude each other"),
        (["no.toml"], "no.toml cannot be read"),
        (["chair"], "chair needs truth; give --option truth=..., --truth PATH to score, or --images scenes to answer"),
    ],
)
def test_wrong_usage_is_named(vlmfix_says, arguments, message):
    said = vlmfix_says("eval", *arguments)
    assert said.exit_code == 2
    assert message in said.stderr


def test_a_frontier_is_swept_and_drawn(vlmfix_says, place):
    said = vlmfix_says(
        "frontier", SCENES, "vcd", "alpha", "0,1", "-o", place / "frontier", "--limit", 2, "-O", "max_new_tokens=48",
        "--json",
    )  # fmt: skip
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert [label for _, _, label in found["curve"]] == ["alpha=0", "alpha=1"]
    assert (place / "frontier" / "chair" / "frontier.svg").read_text().startswith("<svg")
    assert vlmfix_says("frontier", SCENES, "vcd", "alpha", "a,b").exit_code == 2
    assert "write METHOD.alpha" in vlmfix_says("frontier", SCENES, "var+vcd", "alpha", "1").stderr


SLIPS = [
    (("eval", "--methods", "vdc"), "unknown method 'vdc'; did you mean vcd"),
    (("eval", "--methods", "vcd(alhpa=1)"), "vcd has no setting 'alhpa'; did you mean alpha"),
    (("eval", "--methods", "var; vcd(alpha=high)"), "vcd(alpha='high'): give a number"),
    (("eval", "--methods", "vdc", "--dry-run"), "unknown method 'vdc'"),
    (("eval", "--methods", "vdc", "--answers-only"), "unknown method 'vdc'"),
    (("frontier", "vaar", "alpha", "1"), "unknown method 'vaar'; did you mean var"),
    (("frontier", "vcd", "alhpa", "1"), "vcd has no setting 'alhpa'; did you mean alpha"),
]


@pytest.mark.parametrize(("arguments", "message"), SLIPS)
def test_a_slip_in_a_recipe_shows_before_the_model_is_loaded(vlmfix_says, place, fake_model, arguments, message):
    command, *rest = arguments
    said = vlmfix_says(command, SCENES, *rest, "-o", place / "slip")
    assert said.exit_code == 2
    assert message in said.stderr
    assert fake_model == []
    assert not (place / "slip").exists()


def test_a_value_that_does_not_fit_the_model_shows_before_anything_is_answered(vlmfix_says, place):
    for arguments in (
        ("eval", SCENES, "--methods", "vcd(noise_step=5000)"),
        ("frontier", SCENES, "vcd", "noise_step", "5"),
    ):
        said = vlmfix_says(*arguments, "-o", place / "unfit")
        assert said.exit_code == 2
        assert "noise_step=5" in said.stderr
    assert not (place / "unfit").exists()


def test_all_methods_are_rows(vlmfix_says, place):
    said = vlmfix_says(
        "eval", "pope", "--images", SCENES, "--limit", 1, "-o", place / "all", "--methods", "all", "--dry-run",
        "-O", "splits=random", "--json",
    )  # fmt: skip
    assert {"greedy", "var", "vcd"} < {row["row"] for row in json.loads(said.stdout)["rows"]}


@pytest.mark.parametrize("command", ["eval", "score", "frontier", "tune", "verify", "reproduce", "bench"])
def test_help_imports_no_torch(command):
    code = (
        "import sys\nfrom vlmfix.commands import main\ntry:\n    main([sys.argv[1], '--help'])\n"
        "except SystemExit as end:\n    sys.exit(end.code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, check=False)
    assert done.returncode == 0
