"""Times of the kernels on one GPU beside torch's on the same work: flash attention, compiled FlexAttention, cuBLAS.

    python -m benchmarks.kernels --out kernels.json [--only decode] [--no-flex]

Each time is the median over replays of a CUDA graph that runs the operation on several sets of inputs in turn, more
than the L2 cache holds. A case whose result is not within its error budget of the definition gets no time, and the
exit code is 1. `of_ideal` is the ideal time (bytes over the copy bandwidth or operations over the matrix rate, both
measured in the same run, whichever is longer) over the measured one.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernel_cases import ATTENTION, Case
from benchmarks.kernel_linears import GRADIENTS, LINEARS
from benchmarks.kernel_operations import OPERATIONS

REPLAYS = 30


def graph_time(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> dict[str, float]:
    """Microseconds per call: median, 10th and 90th percentile over replays of one graph with all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    times.sort()
    return {"us": statistics.median(times), "p10": times[len(times) // 10], "p90": times[-1 - len(times) // 10]}


def host_time(call: Callable[[], Any], repeats: int = 50) -> float:
    """Microseconds the processor spends to launch one call."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / repeats * 1e6


def ceilings() -> dict[str, float]:
    """Copy bandwidth in bytes per second (read plus written) and bf16 matrix rate in operations per second."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)])["us"]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = graph_time([lambda: a @ b])["us"]
    return {"bytes_per_s": 2 * source.nbytes / copy * 1e6, "flops_per_s": 2 * 8192**3 / product * 1e6}


def measure(case: Case, limits: dict[str, float], flex: bool) -> dict[str, Any]:
    """One row; without times if the check fails."""
    row: dict[str, Any] = {"case": case.name, "bytes": case.bytes, "flops": case.flops, "target": case.target}
    torch.manual_seed(0)
    inputs = [case.inputs() for _ in range(case.sets)]
    try:
        row["error_of_budget"] = case.check(inputs[0])
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {error}"[:2000]}
    if not row["error_of_budget"] <= 1:
        return row | {"failed": "outside the error budget"}
    row["ours"] = graph_time([partial(case.ours, x) for x in inputs])
    row["host_us"] = host_time(partial(case.ours, inputs[0]))
    ideal = max(case.bytes / limits["bytes_per_s"], case.flops / limits["flops_per_s"]) * 1e6
    row |= {"ideal_us": ideal, "of_ideal": ideal / row["ours"]["us"]}
    for name, make in case.baselines.items():
        if name == "flex" and not flex:
            continue
        try:
            baseline = make(inputs[0])
            row[name] = graph_time([partial(baseline, x) for x in inputs])
            row[f"of_{name}"] = row["ours"]["us"] / row[name]["us"]
        except Exception as error:
            row[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "failed" in row:
        return f"{row['case']:34s} FAILED {row['failed'][:300]}"
    text = (
        f"{row['case']:34s} {row['ours']['us']:9.1f} us  {row['of_ideal']:6.1%} of ideal  host {row['host_us']:6.0f} us"
    )
    for name in ("sdpa", "flex", "torch"):
        if f"of_{name}" in row:
            text += f"  {row[f'of_{name}']:.2f} x {name}"
        elif "failed" in row.get(name, {}):
            text += f"  ({name} failed)"
    return text + f"  {row['target']}"


def main() -> int:
    """Runs the cases and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--no-flex", action="store_true", help="leaves out FlexAttention, which compiles for long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these are GPU kernels")
    limits = ceilings()
    properties = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "command": shlex.join(["python", "-m", "benchmarks.kernels", *sys.argv[1:]]),
        "ceilings": limits,
        "rows": [],
    }
    copy, products = limits["bytes_per_s"] / 1e12, limits["flops_per_s"] / 1e12
    sys.stdout.write(f"{properties.name}: copy {copy:.2f} TB/s, bf16 {products:.0f} TFLOP/s\n")
    for case in [*ATTENTION, *OPERATIONS, *LINEARS, *GRADIENTS]:
        if options.only in case.name:
            with torch.no_grad():
                row = measure(case, limits, not options.no_flex)
            result["rows"].append(row)
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(result, indent=1))
    return int(any("failed" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
