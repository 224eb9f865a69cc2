"""Prefill and decoding times of methods beside plain generate, ratios taken in one run.

    python -m benchmarks.decode --shape llava-7b --out results.json       # one GPU
    python -m benchmarks.decode --shape cpu --out results.json            # 8 layers, hidden 512

Random weights: only time and memory are measured. ms/token = (t(new) - t(1)) / (new - 1), prefill = t(1), the best of
`--repeats`; plain generate is timed before and after the methods, and ratios are to the better of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vlmfix
from benchmarks.shapes import SHAPES, build, prompt, weight_bytes
from benchmarks.timing import about, clock, copy_rate, two_forwards

METHODS = (
    "var(sink_dims=[7,9],tau=1.0)",
    "pai",
    "vaf",
    "locore(window=8)",
    "fia",
    "vhr",
    "gift",
    "vcd",
    "m3id",
    "icd(disturbance_ids=[5,6,7])",
    "avisc",
    "sid",
    "dola",
    "sgrs",
)


def measure(generate: Callable[[int], Any], new: int, repeats: int, device: str) -> dict[str, float]:
    """Prefill and per-token milliseconds, and peak memory above what was allocated before."""
    generate(2)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    short = [clock(lambda: generate(1), device) for _ in range(repeats)]
    long = [clock(lambda: generate(new), device) for _ in range(repeats)]
    prefill, whole = min(short), min(long)
    result = {
        "prefill_ms": 1e3 * prefill,
        "ms_per_token": 1e3 * (whole - prefill) / (new - 1),
        "spread_ms": 1e3 * (max(long) - min(long)) / (new - 1),
    }
    if device.startswith("cuda"):
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    """Runs the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--length", type=int, default=640)
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this time")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and options.shape != "cpu" else "cpu"
    begun, rate = time.perf_counter(), copy_rate(device)
    model = build(options.shape, device)
    report: dict[str, Any] = {
        **about(device),
        "shape": options.shape,
        "length": options.length,
        "copy_bytes_per_second": rate,
        "weight_read_floor_ms": 1e3 * weight_bytes(model) / rate,
        "rows": [],
    }
    settings = {"do_sample": False}
    for batch in options.batches:
        inputs = prompt(options.shape, batch, options.length, device)
        cases: list[tuple[str, Callable[[], Callable[[int], Any]]]] = [
            ("transformers sdpa", lambda i=inputs: lambda n: model.generate(**i, max_new_tokens=n, **settings)),
            ("two sequential forwards", lambda i=inputs: lambda n: two_forwards(model, n, i)),
        ]
        for method in options.methods:
            cases.append((method, lambda m=method, i=inputs: _fixed(model, m, i)))
        cases.append((f"{cases[0][0]}, again", cases[0][1]))
        for name, make in cases:
            if time.perf_counter() - begun > options.seconds:
                report.setdefault("not_run", []).append({"batch": batch, "row": name})
                continue
            try:
                row: dict[str, Any] = measure(make(), options.new, options.repeats, device)
            except (vlmfix.VlmfixError, RuntimeError) as error:
                row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            report["rows"].append({"batch": batch, "row": name, **row})
            sys.stderr.write(f"{batch:3d} {name:32s} {row}\n")
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        same = [r for r in report["rows"] if r["batch"] == row["batch"] and r["row"].startswith("transformers sdpa")]
        for name, ratio in (("ms_per_token", "decode_ratio"), ("prefill_ms", "prefill_ratio")):
            if name in row:
                row[ratio] = row[name] / min(r[name] for r in same)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def _fixed(model: Any, method: str, inputs: dict[str, torch.Tensor]) -> Callable[[int], Any]:
    fixed = vlmfix.wrap(model, None, method)

    def run(new: int) -> Any:
        return fixed.generate(**inputs, max_new_tokens=new)

    return run


if __name__ == "__main__":
    main()
