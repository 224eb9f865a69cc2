"""Results of the benchmarks of speed: judged, legible, refused with a reason where a file holds something else."""

import json

import pytest


@pytest.fixture
def file_of(tmp_path):
    """Writes an object to a JSON file."""

    def write(data):
        path = tmp_path / "engine.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


def test_results_are_printed(vlmfix_says, file_of):
    rows = [{"batch": 1, "row": "var", "ms": 1.23456, "report": {"layers": [1]}}, {"batch": 1, "row": "[/x]"}]
    path = file_of({"device": "a card", "versions": {"torch": "2"}, "rows": rows})
    said = vlmfix_says("bench", path)
    assert said.exit_code == 0
    assert [line.split() for line in said.stdout.splitlines()][1:] == [
        [], ["batch", "1"], ["row", "ms"], ["var", "1.23"], ["[/x]"],
    ]  # fmt: skip
    assert "device a card, versions.torch 2" in said.stderr


def test_targets_are_judged(vlmfix_says, file_of):
    rows = [
        {"row": "a", "of_plain": 1.04, "hidden": 7, "targets": {"of_plain": "<= 1.05"}},
        {"row": "b", "of_plain": 1.0504, "of_floor": 2.0, "targets": {"of_plain": "<= 1.05", "of_floor": "<= 2.2"}},
        {"row": "c", "of_ideal": 0.7, "target": ">= 80% of ideal", "note": "one repeat"},
        {"row": "d", "target": "<= 1.1 x sdpa"},
        {"row": "e", "target": "", "targets": {}},
    ]
    runs = [{"device": "a card"}, {"device": "another card"}]
    answers = [{"row": "a", "1": 12.25}]
    path = file_of({"columns": ["row", "of_plain", "targets"], "rows": rows, "runs": runs, "answers": answers})
    found = json.loads(vlmfix_says("bench", path, "--json").stdout)[str(path)]["rows"]
    assert [row.get("targets") for row in found] == ["met", "1 of 2 met", "missed", "not measured", None]
    assert found[2]["judged"] == [{"figure": "of_ideal", "value": 0.7, "target": ">= 0.8", "met": False}]
    said = vlmfix_says("bench", path)
    assert said.exit_code == 0
    assert "hidden" not in said.stdout
    assert "one repeat" in said.stdout
    assert "12.2" in said.stdout
    assert "run 1: device another card" in said.stderr
    lines = [" ".join(line.split()) for line in said.stdout.splitlines()]
    start = lines.index("targets missed")
    assert lines[start + 1 : start + 4] == [
        "row figure value target",
        "b x plain 1.05 <= 1.05",
        "c of_ideal 0.7 >= 0.8",
    ]


def engine_rows():
    figures = {"ms_per_token": 4.0712, "prefill_ms": 1234.5, "peak_gib": 13.678, "of_plain": 1.0, "of_sdpa": 0.2219}
    figures |= {"of_floor": 1.3301, "of_bytes": 1.299, "memory_of_sdpa": 1.0101, "capture_seconds": 0.05731}
    named = {"row": "transformers eager, attention weights", "targets": {"of_plain": "<= 0.9"}}
    return [
        named | figures | {"run": run, "prompt": 640, "batch": batch, "note": "some words " * 20}
        for run, batch in ((0, 1), (1, 16), (1, 1))
    ]


def test_tables_are_legible_at_80_columns(vlmfix_says, file_of, monkeypatch):
    rows = engine_rows()
    answers = [{"row": rows[0]["row"], "run": 1, "1": 5.5, "seconds_per_answer": 0.25, "note": "some words " * 20}]
    columns = [
        "row",
        "run",
        "prompt",
        "batch",
        *(key for key in rows[0] if key.startswith(("ms", "pre", "peak", "of_"))),
    ]
    columns += ["of_static", "memory_of_sdpa", "capture_seconds", "targets"]
    path = file_of({"columns": columns, "rows": rows, "answers": answers, "runs": [{}, {}]})
    monkeypatch.setenv("COLUMNS", "80")
    text = vlmfix_says("bench", path).stdout
    lines = text.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    titles = [line for line in lines if line.startswith("prompt")]
    assert titles == [
        f"prompt 640, batch {batch}, run {run}{more}"
        for run, batch in ((1, 1), (1, 16), (0, 1))
        for more in ("", ", continued")
    ]
    words = " ".join(text.split())
    head = "row ms prefill GiB plain sdpa floor"
    assert f"{head} transformers eager, attention weights 4.07 1230 13.7 1.00 0.222 1.33 prompt" in words
    assert "x plain: multiple of" in text
    assert "static" not in text
    assert text.count("ms: per token") == 1
    assert lines.index("ms: per token") < lines.index("prompt 640, batch 16, run 1")

    monkeypatch.setenv("COLUMNS", "160")
    assert "continued" not in vlmfix_says("bench", path).stdout.partition("notes")[0]


def test_repeated_cases_have_a_table_each(vlmfix_says, file_of):
    rows = [
        {"case": "decode", "warps": 4, "us": 2.0},
        {"case": "decode", "warps": 8, "us": 1.0},
        {"case": "rows", "us": 3.0},
    ]
    lines = vlmfix_says("bench", file_of({"columns": ["case", "warps", "us"], "rows": rows})).stdout.splitlines()
    assert [line.split() for line in lines if line][1:] == [
        ["decode"], ["warps", "us"], ["4", "2.00"], ["8", "1.00"], ["rows"], ["us"], ["3.00"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "messages"),
    [
        ("{", ["not JSON", "python -m benchmarks.engine --out FILE"]),
        ("[]", ['a list of objects under "rows"', "benchmarks/"]),
        ({"rows": [3]}, ['a list of objects under "rows"']),
        ({"columns": 3, "rows": []}, ['"columns" is 3', "a list of names"]),
        ({"runs": 5, "rows": []}, ['"runs" is 5', "a list of objects"]),
        (
            {"rows": [{"row": "a", "targets": {"of_plain": "cheap"}, "of_plain": 1}]},
            ["row 1 (a)", 'the target of "of_plain" is "cheap"', '"<= 1.05"'],
        ),
        ({"rows": [{"row": "a", "targets": {"of_plain": 1}}]}, ['the target of "of_plain" is 1']),
        (
            {"rows": [{}, {"case": "b", "targets": {"of_plain": "<= 1"}, "of_plain": "x"}]},
            ["row 2 (b)", '"of_plain" is "x"', "make it a number"],
        ),
        ({"rows": [{"row": "a", "targets": 5}]}, ['"targets" is 5', "write an object"]),
        ({"rows": [{"row": "a", "target": "<= 1.2.3 x sdpa"}]}, ['"target" is "<= 1.2.3 x sdpa"', "<= 1.1 x sdpa"]),
        ({"rows": [{"row": "a", "run": "last"}]}, ['"run" is "last"', "a whole number"]),
    ],
    ids=str,
)
def test_other_files_are_refused_with_a_reason(vlmfix_says, file_of, data, messages):
    path = file_of(data)
    said = vlmfix_says("bench", path)
    assert said.exit_code == 2
    for message in (str(path), *messages):
        assert message in said.stderr


def test_a_missing_file_is_refused(vlmfix_says, tmp_path):
    said = vlmfix_says("bench", tmp_path / "none.json")
    assert said.exit_code == 2
    assert "cannot be read" in said.stderr
    assert "give a JSON file that a script in benchmarks/ wrote" in said.stderr


def test_odd_content_is_shown(vlmfix_says, file_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    rows = [
        {"row": "a" * 90, "judged": 5, "note": {"a": 1}, "[/b]": float("inf"), "c": True},
        {"row": None, "run": 3},
        {},
    ]
    for data in ({"rows": rows}, {"columns": ["none"], "rows": rows}, {"columns": [], "rows": []}):
        said = vlmfix_says("bench", file_of(data))
        assert said.exit_code == 0
        table = said.stdout.partition("\nrow ")[2].partition("notes")[0]
        assert sum(line.partition(" ")[0].count("a") for line in table.splitlines()) == 90 * bool(data["rows"])
