"""`vlmfix run`: records as they come, one per item and recipe, errors beside answers."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from vlmfix.commands.acting import Acting
from vlmfix.errors import Refusal

from .fake import FakeVLM

ROOT = Path(__file__).parents[2]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(path):
    return [(record["spec"], record["id"]) for record in records(path)]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_folder_to_file(vlmfix_says, fake_model, photos, tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    result = vlmfix_says("run", photos, "--prompt", "Describe.", "--out", out, "--batch-size", 2, "--method", "var")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "5 answered, 0 failed" in result.stderr
    assert "answers/s, 0:00 left" in result.stderr
    assert "var: layers 1-3, 7" in result.stderr
    found = records(out)
    assert [(r["image"], r["text"]) for r in found] == [(f"{n}.png", f"var sees {n}x9") for n in range(1, 6)]
    first = found[0]
    assert {"id", "image", "prompt", "recipe", "text", "tokens", "seconds", "report"} <= first.keys()
    assert (first["prompt"], first["recipe"], first["tokens"]) == ("Describe.", "var", 5)
    assert [len(call["ids"]) for call in fake_model[1:]] == [2, 2, 1]


def test_stdout_is_data_alone(vlmfix_says, fake_model, photos):
    result = vlmfix_says("run", photos, "-p", "Describe.", "--json", "--limit", 2)
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == ["1.png", "2.png"]
    readable = vlmfix_says("run", photos / "1.png", "-p", "Describe.")
    assert readable.stdout == "1.png | Describe. | greedy\n  greedy sees 1x9\n"


def test_options_reach_the_model(vlmfix_says, fake_model, photos):
    vlmfix_says(
        "run", photos / "1.png", "-p", "?", "--model", "some/model", "--device", "cpu", "--dtype", "float32",
        "--device-map", "auto", "--revision", "abc", "--quantize", "4bit", "--processor", "max_pixels=9", "--processor",
        "mode=fast", "--trust-remote-code", "--engine", "graph", "--compile",
        "--max-new-tokens", 7, "--temperature", 0.5, "--seed", 3, "--beams", 2,
    )  # fmt: skip
    assert fake_model[0] == {
        "model": "some/model", "device": "cpu", "dtype": "float32", "device_map": "auto", "revision": "abc",
        "quantize": "4bit", "processor_kwargs": {"max_pixels": 9, "mode": "fast"}, "trust_remote_code": True,
        "engine": "graph", "compile": True,
    }  # fmt: skip
    call = fake_model[1]
    assert (call["max"], call["seed"], call["temperature"], call["do_sample"], call["num_beams"]) == (
        7,
        3,
        0.5,
        True,
        2,
    )


def test_prompts_of_a_picture_follow_each_other(vlmfix_says, fake_model, photos):
    rows = [{"image": f"{n}.png", "prompt": f"{question}?"} for question in "abc" for n in range(1, 6)]
    vlmfix_says("run", write(photos / "ask.jsonl", *rows), "--batch-size", 2, "--json")
    seen = [tuple(image.width for image in call["images"]) for call in fake_model[1:]]
    assert seen == [(1, 2)] * 3 + [(3, 4)] * 3 + [(5,)] * 3


def test_several_pictures_and_none(vlmfix_says, fake_model, photos):
    rows = [{"image": ["1.png", "2.png"], "prompt": "a"}, {"image": None, "prompt": "b"}]
    found = [
        json.loads(line) for line in vlmfix_says("run", write(photos / "x.jsonl", *rows), "--json").stdout.splitlines()
    ]
    assert [r["text"] for r in found] == ["greedy sees 1x9 and 2x9", "greedy sees nothing"]
    assert [r["image"] for r in found] == [["1.png", "2.png"], None]


def test_faults_become_error_records_while_others_go_on(vlmfix_says, fake_model, photos, tmp_path):
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    path = write(
        photos / "ask.jsonl",
        {"image": "1.png", "prompt": "fine"},
        "{not json",
        {"image": "gone.png", "prompt": "missing"},
        {"image": "cut.jpg", "prompt": "damaged"},
        {"image": "2.png", "prompt": "explode"},
        {"image": "3.png", "prompt": "fine too"},
    )
    out = tmp_path / "answers.jsonl"
    result = vlmfix_says("run", path, "--out", out)
    assert result.exit_code == 1
    assert "2 answered, 4 failed" in result.stderr
    found = {record["id"].split(":")[0]: record for record in records(out)}
    assert [key for key, record in found.items() if "text" in record] == ["1.png", "3.png"]
    assert "not JSON" in found["ask.jsonl line 2"]["error"]
    assert found["ask.jsonl line 2"]["prompt"] is None
    assert found["gone.png"]["error"].startswith("ask.jsonl line 3: ")
    assert "no such file; check the path" in found["gone.png"]["error"]
    assert "convert it" in found["cut.jpg"]["error"]
    assert found["2.png"]["error"] == "ask.jsonl line 5: RuntimeError: boom"
    assert all("text" not in record or "error" not in record for record in found.values())

    again = vlmfix_says("run", path, "--out", out)
    assert again.exit_code == 1
    assert "--retry-errors asks those again" in again.stderr
    assert len(records(out)) == 6

    path.write_text(path.read_text().replace("explode", "stay whole"))
    (photos / "4.png").rename(photos / "gone.png")
    retried = vlmfix_says("run", path, "--out", out, "--retry-errors")
    assert retried.exit_code == 1
    assert max(Counter(keys(out)).values()) == 1
    assert sorted(record["image"] for record in records(out) if "text" in record) == [
        "1.png",
        "2.png",
        "3.png",
        "gone.png",
    ]


def test_restart_answers_only_what_is_new(vlmfix_says, fake_model, photos, tmp_path):
    out = tmp_path / "a.jsonl"
    common = ("run", photos, "-p", "Describe.", "--out", out)
    vlmfix_says(*common, "--limit", 2)
    fake_model.clear()
    result = vlmfix_says(*common, "--json")
    assert len(fake_model[1]["ids"]) == 3
    summary = json.loads(result.stdout)[0]
    assert (summary["answered"], summary["failed"], summary["kept"]) == (3, 0, 2)
    fake_model.clear()
    assert vlmfix_says(*common).exit_code == 0
    assert not fake_model  # nothing to do: the model is not even loaded
    vlmfix_says(*common, "--method", "greedy; var", "--max-new-tokens", 9)
    assert len(records(out)) == 15
    assert max(Counter(keys(out)).values()) == 1


def test_ids_are_not_reused_for_other_prompts(vlmfix_says, fake_model, photos, tmp_path):
    out = tmp_path / "a.jsonl"
    vlmfix_says("run", write(photos / "x.jsonl", {"id": "q", "image": "1.png", "prompt": "a"}), "--out", out)
    result = vlmfix_says("run", write(photos / "x.jsonl", {"id": "q", "image": "1.png", "prompt": "b"}), "--out", out)
    assert result.exit_code == 2
    assert "holds another prompt under id 'q'; choose another --out" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "vdc"], "unknown method 'vdc'; did you mean vcd"),
        (["--method", "vcd(alhpa=1)"], "did you mean alpha?"),
        (["--method", "m3id"], "m3id cannot act here"),
        (["--processor", "max_pixels"], "write KEY=VALUE"),
        (["--out", "answers.txt"], "give a .jsonl file"),
        (["--out", "/proc/answers.jsonl"], "cannot be written"),
        (["--prompt", "{title}"], "{title} is no column here"),
        (["--batch-size", "0"], "batch-size"),
        (["--bach-size", "1"], "No such option"),
    ],
)
def test_wrong_usage(vlmfix_says, fake_model, photos, arguments, words):
    result = vlmfix_says("run", photos, "--prompt", "?", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not any("ids" in call for call in fake_model)


def test_no_permission(vlmfix_says, fake_model, photos, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    result = vlmfix_says("run", photos, "-p", "?", "--out", tmp_path / "a.jsonl")
    assert result.exit_code == 2
    assert "cannot be written (Permission denied); choose another place" in " ".join(result.stderr.split())


def test_settings_that_the_model_refuses_are_wrong_usage(vlmfix_says, fake_model, photos, tmp_path, monkeypatch):
    def refuse(self, images, prompts, **_):
        raise Refusal("beams do not go with this method; use --beams 1")

    monkeypatch.setattr(FakeVLM, "answer", refuse)
    out = tmp_path / "a.jsonl"
    result = vlmfix_says("run", photos, "-p", "?", "--beams", 3, "--out", out)
    assert result.exit_code == 2
    assert "use --beams 1" in result.stderr
    assert out.read_text() == ""


def test_an_item_that_the_model_refuses_is_its_own_error(vlmfix_says, fake_model, photos, monkeypatch):
    answer = FakeVLM.answer

    def picky(self, images, prompts, **options):
        if any(image.width == 3 for image in images):
            raise Refusal("too narrow")
        return answer(self, images, prompts, **options)

    monkeypatch.setattr(FakeVLM, "answer", picky)
    result = vlmfix_says("run", photos, "-p", "?", "--json")
    assert result.exit_code == 1
    found = {record["image"]: record for record in map(json.loads, result.stdout.splitlines())}
    assert found["3.png"]["error"] == "3.png: too narrow"
    assert sum("text" in record for record in found.values()) == 4


def test_full_stdout(photos):
    with open("/dev/full", "w") as full:
        process = start(photos, "-p", "?", "--json", stdout=full)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left on device; make room" in stderr


def test_interrupt_says_how_to_go_on(photos, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(photos, "-p", "?", "--out", out, "--batch-size", 1, FAKE_SECONDS="0.3")
    wait_for(out, 100, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in stderr


def wait_for(path, size, process):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > size):
        assert time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.02)


def start(*arguments, stdout=subprocess.PIPE, **settings):
    command = [sys.executable, "-m", "tests.cli.fake", "run", *map(str, arguments)]
    limit = settings.pop("file_size", None)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )


def test_kill_loses_at_most_the_batch_in_flight(photos, tmp_path):
    out, log = tmp_path / "a.jsonl", tmp_path / "asked"
    rows = [{"image": f"{1 + n % 5}.png", "prompt": f"question {n}"} for n in range(40)]
    arguments = (write(photos / "ask.jsonl", *rows), "--out", out, "--batch-size", 2)
    process = start(*arguments, FAKE_SECONDS="0.1", FAKE_LOG=str(log))
    wait_for(out, 1000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(keys(out))
    assert 0 < before < 40
    with out.open("a") as file:
        file.write('{"id": "half a li')  # what a kill in the middle of a write leaves
    again = start(*arguments, FAKE_LOG=str(log))
    assert again.wait(60) == 0, again.stderr.read()
    assert len(keys(out)) == 40
    assert max(Counter(keys(out)).values()) == 1
    assert len(log.read_text().split("\n")) - 1 <= 40 + 2


def test_full_disk(photos, tmp_path):
    out = tmp_path / "a.jsonl"
    process = start(photos, "-p", "Describe.", "--out", out, "--batch-size", 1, file_size=700)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cannot be written: File too large" in stderr
    assert "start again" in stderr
    kept = len(records(out))
    assert 0 < kept < 5
    assert start(photos, "-p", "Describe.", "--out", out).wait(60) == 0
    assert len(records(out)) == 5


def test_the_summary_says_how_it_was_decoded():
    acting = Acting()
    acting.add([{"text": "a", "report": {"engine": {"name": "graph"}}}] * 2)
    acting.add([{"text": "b", "report": {"engine": {"name": "hf", "reason": "beam search"}}}])
    acting.add([{"text": "c", "report": {"engine": {"name": "hf"}}}])
    assert acting.lines() == ["engine graph for 2 of 4 answers", "engine hf for 1 of 4 answers: beam search"]


def test_the_summary_says_how_long_compiling_took_and_nothing_that_a_warning_said():
    acting = Acting()
    engine = {"name": "graph", "form": "compiled", "reason": "every step runs anew"}
    acting.add([{"text": "a", "report": {"engine": {**engine, "capture_seconds": 3.0}}}] * 2)
    acting.add([{"text": "b", "report": {"engine": {**engine, "capture_seconds": 0.0}}}])
    acting.add([{"text": "c", "report": {"engine": {"name": "hf", "reason": "compile=True: no steps on cpu"}}}])
    assert acting.lines() == ["engine graph for 3 of 4 answers: every step runs anew", "compiling took 3.0 s"]


def test_a_folder_of_answers_gets_a_file_that_is_named(vlmfix_says, fake_model, photos, tmp_path):
    asked = ("run", photos, "-p", "Describe.", "--out", tmp_path, "--json")
    result = vlmfix_says(*asked)
    (file,) = tmp_path.glob("*.jsonl")
    assert len(records(file)) == 5
    assert f"in {file}" in result.stderr
    assert json.loads(result.stdout)[0]["out"] == str(file)
    again = vlmfix_says(*asked)
    assert json.loads(again.stdout)[0] | {"seconds": 0} == {
        "recipe": "greedy", "answered": 0, "failed": 0, "kept": 5, "seconds": 0, "out": str(tmp_path),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt; give --prompt TEXT"),
        (["-p", " "], "--prompt is empty"),
        (["-p", "?", "--method", "all"], "'all' belongs to `vlmfix eval --methods all`"),
        (["-p", "?", "--method", "var+"], "recipe 'var+': a method's name is missing beside a '+'"),
    ],
)
def test_what_gives_no_answer_is_refused_before_the_model_is_loaded(
    vlmfix_says, fake_model, photos, arguments, message
):
    for source in (photos, photos / "1.png"):
        result = vlmfix_says("run", source, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert fake_model == []


def test_a_recipe_is_answered_by_the_engine_that_was_chosen(vlmfix_says):
    result = vlmfix_says(
        "run", ROOT / "examples/scenes/images/000001.png", "-p", "Describe the image.", "--device", "cpu",
        "--engine", "graph", "--max-new-tokens", 5,
        "--method", "pai", "--json",
    )  # fmt: skip
    assert json.loads(result.stdout)["report"]["engine"]["name"] == "graph"
    assert "engine graph for 1 of 1 answers" in result.stderr
