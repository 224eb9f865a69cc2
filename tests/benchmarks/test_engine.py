"""The benchmark of the engines, end to end on tiny shapes; figures of so small a model mean nothing."""

import json

import pytest
import torch

from benchmarks import agreement, engine, engine_rows
from benchmarks.engine_cases import AGAIN, BASELINES, SDPA, STATIC, TWO, Case, derive, interleaved, order, prompts_of
from benchmarks.shapes import SHAPES, build, prompt, token_bytes, weight_bytes
from vlmfix import registry
from vlmfix.engine import sessions

from ..engine import tape

SHORT = ("--prompt", "24", "--batch", "1", "--new", "2", "4", "--repeats", "1")


def run(path, shape, *options):
    code = engine.main(["--shape", shape, *SHORT, "--out", str(path), *options])
    return code, json.loads(path.read_text())


@pytest.mark.parametrize("shape", ["tiny-llava", "tiny-qwen"])
def test_a_run_measures_and_goes_on(shape, tmp_path):
    path = tmp_path / "engine.json"
    asked = ("--rows", "vcd$|opera$|two", "--answers", "1", "2", "--answer-tokens", "2")
    code, report = run(path, shape, *asked)
    assert code == 0
    rows = {row["row"]: row for row in report["rows"]}
    assert set(rows) == {SDPA, "hf greedy", "hf vcd", TWO, "hf opera", SDPA + AGAIN, "hf greedy" + AGAIN}
    assert all("of_sdpa" in row and row["device"] and row["seconds"] > 0 for row in rows.values())
    assert rows["hf vcd"]["targets"].keys() == {"of_bytes", "of_plain_and_bytes", "of_plain"}
    assert rows["hf opera"]["returns"] == [0]
    run_of = report["runs"][0]
    floor = run_of["weight_bytes"] / run_of["copy_bytes_per_second"]
    assert rows["hf vcd"]["of_floor"] == pytest.approx(rows["hf vcd"]["ms_per_token"] / 1e3 / floor)
    [answers] = report["answers"]
    assert answers["row"] == SDPA
    assert answers["2"] - answers["1"] == pytest.approx(answers["seconds_per_answer"])
    assert "carve" in [row["row"] for row in report["left_out"]]

    code, more = run(path, shape, "--have", str(path), "--rows", "vcd$|pai$")
    assert code == 0
    found = {(row["row"], row["run"]) for row in more["rows"]}
    assert {("hf vcd", 0), ("hf pai", 1), ("hf greedy", 0), ("hf greedy", 1)} <= found
    assert ("hf vcd", 1) not in found
    assert next(row for row in more["rows"] if row["row"] == "hf pai")["of_other_runs"] == ["of_two_forwards"]


def test_failures_are_recorded_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(model, processor, recipe, **options):
        raise RuntimeError("no memory") if recipe == "pai" else engine.vlmfix.Refusal("not here")

    monkeypatch.setattr(engine.vlmfix, "wrap", broken)
    code, report = run(tmp_path / "engine.json", "tiny-llava", "--rows", "hf pai$|hf vcd$|eager$")
    rows = {row["row"]: row for row in report["rows"]}
    assert code == 1
    assert rows["hf pai"]["error"] == "RuntimeError: no memory"
    assert rows["hf vcd"]["note"] == "refused: not here"
    assert "error" not in rows["hf vcd"]
    assert rows["transformers eager"]["ms_per_token"]


def test_the_clock_stops_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.vlmfix, "wrap", lambda *given, **options: engine.time.sleep(9))
    path = tmp_path / "engine.json"
    code, report = run(path, "tiny-llava", "--rows", "pai$", "--row-seconds", "0.1")
    assert code == 1
    assert "took more than" in next(row for row in report["rows"] if row["row"] == "hf pai")["error"]
    path.unlink()
    assert engine.main(["--shape", "tiny-llava", "--seconds", "0", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert not report["rows"]
    expected = interleaved(order(SHAPES["tiny-llava"], ["hf"], False), 24)
    assert [row["row"] for row in report["not_run"]] == [case.row for case in expected]


def test_every_method_and_baseline_has_its_rows():
    cases = order(SHAPES["llava-7b"], ("graph", "hf"), True)
    rows = [(case.prompt, case.batch, case.row) for case in cases]
    assert len(set(rows)) == len(rows)
    names = {row.name for row in registry.ROWS if row.kind in ("attention", "decoding")}
    for batch in (1, 16):
        here = {row for length, size, row in rows if (length, size) == (640, batch)}
        assert {*BASELINES, TWO, "hf greedy", "graph greedy"} <= here
        assert {f"hf {name}" for name in names} <= here
        assert {f"graph {name}" for name in names - {"opera"}} <= here
        long = {row for length, size, row in rows if (length, size) == (4096, batch)}
        assert {SDPA, TWO, "graph var", "graph vcd", "hf var", "hf vcd"} <= long
    assert {f"graph+compile {name}" for name in names - {"sgrs", "opera"}} <= {row for *_, row in rows}
    assert rows[:4] == [(640, 1, name) for name in (SDPA, "graph greedy", "hf greedy", STATIC)]


def test_plain_rows_are_measured_again():
    names = [f"method{n}" for n in range(8)]
    rows = [Case(640, 1, "greedy", "graph"), Case(640, 1, "greedy", "hf")]
    rows += [Case(640, 1, name, "graph") for name in names] + [Case(640, 1, "vcd", "hf")]
    rows += [Case(4096, 1, "greedy", "graph"), Case(4096, 1, "vcd", "graph"), Case(640, 1, "var", "graph+compile")]
    found = [case.row for case in interleaved(rows, 640)]
    again = "graph greedy" + AGAIN
    graph = [*(f"graph {name}" for name in names[:6]), again, *(f"graph {name}" for name in names[6:]), again + " 2"]
    later = ["hf vcd", "hf greedy" + AGAIN, "graph greedy", "graph vcd", "graph+compile var"]
    assert found == ["graph greedy", "hf greedy", *graph, *later]
    assert interleaved(rows[:2], 640) == rows[:2]

    whole = interleaved(order(SHAPES["llava-7b"], ("graph", "hf"), True), 640)
    assert len({(case.prompt, case.batch, case.row) for case in whole}) == len(whole)
    assert {SDPA + AGAIN, again + " 3"} <= {case.row for case in whole if (case.prompt, case.batch) == (640, 16)}


def test_answers_stop_where_the_next_number_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_rows, "PACE", 2)
    asked = ("--rows", "none", "--answers", "1", "1000000", "--answer-tokens", "1", "--answer-seconds", "60")
    _, report = run(tmp_path / "engine.json", "tiny-llava", *asked)
    [answers] = report["answers"]
    assert answers["note"].startswith("2 answers in ")
    assert answers["note"].endswith("1000000 do not fit in 60 s")
    assert answers["1"] < 60


def test_a_slow_row_is_timed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_rows, "SLOW", 0.0)
    asked = ("--rows", "none", "--new", "2", "6", "--repeats", "3")
    _, report = run(tmp_path / "engine.json", "tiny-llava", *asked)
    assert {(row["repeats"], tuple(row["new"])) for row in report["rows"]} == {(1, (2, 4))}


def test_lengths_too_close_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        engine.main(["--shape", "tiny-llava", "--new", "4", "5", "--out", str(tmp_path / "engine.json")])


def test_bytes_of_a_step():
    model = build("tiny-qwen", "cpu")
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    table = model.get_input_embeddings().weight.numel()
    assert weight_bytes(model) == 4 * decoder  # the output head is as large as the embeddings, which are not read
    assert model.lm_head.weight.numel() == table
    assert token_bytes("tiny-qwen") == 2 * 4 * 2 * 16 * 4
    assert token_bytes("llava-7b") == 2 * 32 * 4096 * 2
    assert token_bytes("qwen-7b") == 2 * 28 * 4 * 128 * 2
    lengths = {name: prompts_of(Case(640, 1, name, "hf"), 576) for name in ("var", "vcd", "m3id", "avisc", "opera")}
    assert lengths == {"var": [640], "vcd": [640] * 2, "m3id": [640, 64], "avisc": [640] * 2, "opera": [640]}
    assert prompts_of(Case(640, 1, TWO), 576) == [640] * 2


def test_targets_follow_from_the_rows_of_the_same_run():
    def row(name, method, engine_, ms, run_, branches=0, gib=10.0):
        cell = {"prompt": 640, "batch": 1, "device": "card", "prefill_ms": 5.0}
        own = {"row": name, "method": method, "engine": engine_, "ms_per_token": ms, "run": run_, "peak_gib": gib}
        return cell | own | {"branches": branches, "key_bytes": 100.0 * (1 + branches)}

    rows = [
        row(SDPA, SDPA, "transformers", 20.0, 0),
        row("graph greedy", "greedy", "graph", 1.0, 0),
        row("graph greedy" + AGAIN, "greedy", "graph", 3.0, 0),
        row("graph gift", "gift", "graph", 4.4, 0, gib=10.1),
        row("graph greedy", "greedy", "graph", 1.0, 1),
        row("graph greedy" + AGAIN + " 2", "greedy", "graph", 5.0, 0),
        row("graph vcd", "vcd", "graph", 5.5, 0, branches=1),
        row(TWO, TWO, "transformers", 50.0, 1, branches=1),
        row(TWO + AGAIN, TWO, "transformers", 60.0, 1, branches=1),
        row("hf sgrs", "sgrs", "hf", 40.0, 0),
    ]
    runs = [{"copy_bytes_per_second": 1e6, "weight_bytes": 1900.0, "usual_prompt": 640}] * 2
    derive(report := {"rows": rows, "runs": runs})
    gift, vcd = report["rows"][3], report["rows"][6]
    assert gift["of_plain"] == pytest.approx(4.4 / 4)  # the mean of the nearest before and after it in its run
    assert [report["rows"][n]["of_plain"] for n in (1, 2, 5)] == pytest.approx([1 / 3, 3 / 3, 5 / 3])
    assert report["rows"][0]["of_sdpa"] == 1
    assert gift["of_floor"] == pytest.approx(4.4 / 1.9)
    assert gift["memory_of_sdpa"] == pytest.approx(1.01)
    assert gift["targets"] == {
        "memory_of_sdpa": "<= 1.03", "of_plain": "<= 1.08", "of_floor": "<= 2.2", "of_sdpa": "<= 0.333",
    }  # fmt: skip
    assert vcd["of_bytes"] == pytest.approx(5.5 / 2.1)
    assert vcd["of_plain_and_bytes"] == pytest.approx(1.1 * 2000 / 2100)
    assert vcd["of_two_forwards"] == pytest.approx(0.1)
    assert vcd["of_other_runs"] == ["of_two_forwards"]
    assert set(vcd["targets"]) == {"of_bytes", "of_plain_and_bytes", "of_two_forwards"}
    assert report["rows"][9]["targets"] == {}  # no plain row of engine hf to compare with


def test_prompts_differ_in_their_pictures_alone():
    one, other = (prompt("tiny-qwen", 2, 24, "cpu", seed) for seed in (1, 2))
    assert one["input_ids"].shape == (2, 24)
    assert int(one["mm_token_type_ids"].sum()) == 2 * SHAPES["tiny-qwen"].visual
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_agreement_of_engines_is_reported(tmp_path, monkeypatch):
    path = tmp_path / "agreement.json"
    given = ["--families", "llava", "--methods", "greedy", "opera", "--processes", "1", "--out", str(path)]
    monkeypatch.setitem(sessions.RECORDERS, "cpu", tape.record)
    assert agreement.main([*given, "--only", "tokens"]) == 0
    report = json.loads(path.read_text())
    (greedy, opera), (half,) = report["tokens"], report["rounding"]
    assert (half["method"], half["captured"], half["form"]) == ("greedy", True, "fused")
    assert 1e-5 < half["graph"] < 0.1
    assert half["times"] == half["graph"] / half["hf"]
    assert (greedy["method"], greedy["name"], greedy["captured"]) == ("greedy", "graph", True)
    assert (greedy["equal"], greedy["reused"]) == (True, True)
    assert opera["equal"]
    assert (opera["name"], opera["reason"]) == ("hf", "opera searches over beams")

    pairs = ((("hf", 2), ("graph", 2)), (("hf", 2), ("hf", 1)))
    monkeypatch.setattr(agreement, "PAIRS", pairs)
    assert agreement.main([*given, "--only", "captions", "--scenes", "2", "--new", "6", "--recipes", "greedy"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["one"], row["other"]) for row in rows] == [
        ("hf, batch 2", "graph, batch 2"), ("hf, batch 2", "hf, batch 1"),
    ]  # fmt: skip
    assert all(row["captions"] == 2 and row["share"] == row["differ"] / 2 for row in rows)


def test_an_answer_that_parts_is_told():
    class Own:
        sequences = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
        logits = (torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([[4.0, 1.0], [0.0, 3.0]]))

    other = torch.tensor([[1, 2, 3, 9], [1, 2, 5, 6]])
    assert agreement._apart(Own, Own.sequences) is None
    assert agreement._apart(Own, other) == {"step": 1, "row": 0, "margin": 3.0}
