"""Decoding under both engines beside transformers' own ways, on one device, random weights.

    python -m benchmarks.engine --shape llava-7b --seconds 250 --out engine.json                    # one GPU
    python -m benchmarks.engine --shape llava-7b --have engine.json --seconds 250 --out engine.json # goes on from there
    python -m benchmarks.engine --shape cpu --out engine.json                                       # engine hf, CPU

Seconds to the first answers alone: `--prompt 640 --batch 1 --engines graph --answers 1 10 100 --rows "static|compile
greedy"`.

Rows come in an order in which what matters most is first, and the file is written after each; a row that fails is
recorded with its message. Only time and memory are measured. Every call sees other pictures.

ms_per_token: (t(long) - t(short)) / (long - short), the best of up to `--repeats` each, fewer where they take over 3
seconds. `new` says how long they are: `--new` where steps are captured or compiled, half as far apart elsewhere, where
a step takes several times as long. prefill_ms: t(short) less its tokens. peak_gib: the most memory allocated, capture
included. of_plain, of_sdpa, of_static, of_two_forwards: multiples of the plain row of the same cell and engine (of
transformers' 5 beams for opera), of transformers' sdpa, of its compiled static cache, of two sequential forwards.

A host that others use too drifts by a few percent within minutes, more than some methods cost. So the plain row of an
engine is measured again after every six of its rows and after the last one, and a row is compared with the mean of the
two measurements next to it in time, one before and one after; the best plain row of a run would make whatever was
measured in a slower minute look costly. The ratios of a plain row itself, to its own neighbours, show the drift. Rows
without a partner in their run compare with another run's and say so in `of_other_runs`.

of_floor: of the time that reading the weights takes at the copy bandwidth measured in the same run; of_bytes: with the
keys and values of all rows; of_plain_and_bytes: of_plain over what it would be if time were proportional to those
bytes.

Seconds to the first answers (100 tokens each, batch 1) count from before the model is wrapped, with capture and
compilation, in a process whose compilation caches start out empty; a row stops once the next number does not fit in
`--answer-seconds` at its pace, seconds_per_answer, which leaves the first one out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import vlmfix
from benchmarks.engine_cases import COLUMNS, Case, derive, interleaved, left_out, order, prompts_of
from benchmarks.engine_rows import Bench
from benchmarks.shapes import SHAPES, token_bytes, weight_bytes
from benchmarks.timing import about


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block once it took so long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def chosen(options: argparse.Namespace, have: dict[str, Any], gpu: bool) -> list[Case]:
    """The rows to measure: those asked for and not there yet, among the plain ones that they compare with."""

    def key(row: dict[str, Any]) -> tuple[int, int, str]:
        return row["prompt"], row["batch"], row["row"]

    done = {key(row) for row in have.get("rows", ()) if "error" not in row}
    asked = [
        case
        for case in order(SHAPES[options.shape], options.engines or (("graph", "hf") if gpu else ("hf",)), gpu)
        if (not options.prompt or case.prompt in options.prompt)
        and (not options.batch or case.batch in options.batch)
        and (re.search(options.rows, case.row) or case.plain)
    ]
    left = [case for case in asked if (case.prompt, case.batch, case.row) not in done]
    cells = {(case.prompt, case.batch) for case in left if not case.plain}
    todo = [case for case in asked if case in left or (case.plain and (case.prompt, case.batch) in cells)]
    return interleaved(todo, SHAPES[options.shape].prompts[0])


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--prompt", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--batch", type=int, nargs="+", help="only these sizes")
    parser.add_argument("--rows", default="", help="only rows that this expression finds, and plain ones")
    parser.add_argument("--engines", nargs="+", choices=["graph", "hf"], help="both on a GPU, hf elsewhere, by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--row-seconds", type=float, default=150, help="give a row up after this time")
    parser.add_argument("--new", type=int, nargs=2, default=[8, 72], help="tokens of a short and a long generation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, nargs="+", default=[], help="seconds to these numbers of answers")
    parser.add_argument("--answer-seconds", type=float, default=90, help="time for the answers of a row")
    parser.add_argument("--answer-tokens", type=int, default=100)
    parser.add_argument("--have", type=Path, help="results to go on from")
    parser.add_argument("--list", action="store_true", help="show the rows in their order and stop")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    options = parser.parse_args(given)
    if not 1 <= options.new[0] <= options.new[1] - 2:
        parser.error(f"--new {options.new[0]} {options.new[1]}: the long one has to be longer by two tokens or more")
    return options


def main(given: list[str] | None = None) -> int:
    """Measures and writes after each row; 1 if a row failed, 2 if the device was lost."""
    begun, options = time.perf_counter(), arguments(given)
    have = json.loads(options.have.read_text()) if options.have and options.have.exists() else {}
    if have and have["shape"] != options.shape:
        raise SystemExit(f"{options.have} holds the shape {have['shape']}, not {options.shape}; choose another --have")
    if options.list:
        rows = chosen(options, have, torch.cuda.is_available() or options.shape != "cpu")
        sys.stdout.write("".join(f"{case.prompt:5d} {case.batch:3d} {case.row}\n" for case in rows))
        return 0
    if options.answers:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = tempfile.mkdtemp()
    bench = Bench(options.shape, options)
    run = {
        **about(bench.device),
        "copy_bytes_per_second": bench.rate,
        "weight_bytes": weight_bytes(bench.model),
        "model_gib": bench.resident / 2**30,
        "usual_prompt": SHAPES[options.shape].prompts[0],
        "start_seconds": time.perf_counter() - begun,
    }
    run["weight_read_floor_ms"] = 1e3 * run["weight_bytes"] / run["copy_bytes_per_second"]
    report: dict[str, Any] = {
        "shape": options.shape,
        "columns": list(COLUMNS),
        "rows": have.get("rows", []),
        "answers": have.get("answers", []),
        "left_out": left_out(),
        "runs": [*have.get("runs", []), run],
    }
    todo = chosen(options, have, bench.gpu)
    while True:
        report["not_run"] = [{"prompt": case.prompt, "batch": case.batch, "row": case.row} for case in todo]
        derive(report)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        if not todo or time.perf_counter() - begun > options.seconds:
            return int(any("error" in row for row in report["rows"]))
        if not measured(bench, todo.pop(0), report):
            return 2


def measured(bench: Bench, case: Case, report: dict[str, Any]) -> bool:
    """Adds a row to the report; whether the device still answers."""
    lengths, new = prompts_of(case, SHAPES[bench.name].visual), sum(bench.new(case)) / 2
    row: dict[str, Any] = {
        "row": case.row,
        "method": case.name,
        "engine": case.engine,
        "prompt": case.prompt,
        "batch": case.batch,
        "run": len(report["runs"]) - 1,
        "device": report["runs"][-1]["device"],
        "branches": len(lengths) - 1,
        "key_bytes": case.batch * sum(length + new / 2 for length in lengths) * token_bytes(bench.name),
    }
    begun, alive = time.perf_counter(), True
    try:
        with at_most(bench.options.row_seconds):
            found, answers = bench.row(case)
        row |= found
        if answers:
            report["answers"].append({"row": case.row, "run": row["run"], **answers})
    except vlmfix.Refusal as refusal:
        row["note"] = f"refused: {refusal}"
    except Exception as error:  # whatever one row dies of, the others are still worth having
        row["error"] = row["note"] = f"{type(error).__name__}: {error}"[:600]
    try:
        bench.forget()
    except RuntimeError as error:
        row["error"], alive = f"the device was lost: {error}"[:600], False
    row["seconds"] = time.perf_counter() - begun
    same = ("prompt", "batch", "row")
    others = [r for r in report["rows"] if any(r[key] != row[key] for key in same) or (case.plain and "error" not in r)]
    report["rows"] = [*others, row]
    shown = row.get("note", "")
    if "ms_per_token" in row:
        shown = f"{row['ms_per_token']:8.2f} ms/token {row['prefill_ms']:8.1f} ms prefill {shown}"
    sys.stderr.write(f"{case.prompt:5d} {case.batch:3d} {case.row:44s} {shown[:160]}  ({row['seconds']:.1f} s)\n")
    return alive


if __name__ == "__main__":
    sys.exit(main())
