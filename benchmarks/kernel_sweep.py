"""Tries launch configurations of the kernels and prints the fastest; the kernels' own choice is edited by hand.

    python -m benchmarks.kernel_sweep --out sweep.json [--only linear] [--seconds 90]

Every configuration is compiled first, several at a time, and then timed on its own; one whose result is outside the
error budget counts as failed. Of the products of a few rows, which have dozens, the `BEST` fastest stand in the results
beside what the kernel chooses by itself (`own`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernel_cases import ATTENTION, Case
from benchmarks.kernel_linears import LINEARS
from benchmarks.kernel_operations import OPERATIONS
from benchmarks.kernels import REPLAYS, graph_time
from benchmarks.timing import about
from vlmfix.kernels.contrast import triton_choose
from vlmfix.kernels.grouped_attention import tiles, triton
from vlmfix.kernels.saliency_row import triton as saliency

CASES = {case.name: case for case in [*ATTENTION, *OPERATIONS, *LINEARS]}
Choice = dict[str, Any]

BEST = 5
"""Configurations reported of a case with many."""

MANY = 12
"""Most configurations of which all are reported, and timed at length."""

QUICK_REPLAYS = 3
"""Replays of a case with more."""

TOGETHER = 8
"""Configurations that a process compiles for one set of inputs."""


def grid(**values: tuple[Any, ...]) -> list[Choice]:
    """All combinations."""
    rows: list[Choice] = [{}]
    for name, options in values.items():
        rows = [row | {name: option} for row in rows for option in options]
    return rows


def tile(rows: int, step: int, warps: int, stages: int, **more: Any) -> Choice:
    """A configuration of the tile kernel."""
    return {"M": rows, "N": step, "num_warps": warps, "num_stages": stages} | more


WIDE = [tile(128, 64, 8, 2), tile(128, 64, 8, 3), tile(128, 64, 8, 4), tile(128, 32, 8, 4)]
TALL = [tile(64, 64, 4, 2), tile(64, 64, 4, 3), tile(64, 32, 4, 3), tile(64, 32, 4, 4)]
CHOICES: dict[str, list[Choice]] = {
    "prefill B=4 32/32 4096": [*WIDE, tile(128, 64, 8, 3, parts="float32"), *TALL[:2]],
    "prefill B=4 32/32 4096 slopes": [*WIDE, *TALL[:2]],
    "rows 64 B=1 32/32 K=4096": [row | {"splits": n} for row in TALL[1:] for n in (4, 8, 12)],
    "rows 64 B=1 28/4 K=640": [row | {"splits": n} for row in TALL[1:] for n in (1, 3, 5, 9)],
    "prefill B=1 28/4 640": [*WIDE[1:2], *TALL],
    "contrast draw B=1 V=152064": grid(few=(128, 256, 1024)),
    "decode B=8 32/8 K=4096": grid(N=(32, 64), num_warps=(4,), num_stages=(3, 4), factor=(1,)),
    "decode B=1 32/8 K=65536": grid(N=(32, 64), num_warps=(4,), num_stages=(3, 4), factor=(1,)),
    "decode B=1 28/4 K=640": grid(N=(32, 64), num_warps=(4,), num_stages=(3,), factor=(0.5, 1)),
}

SALIENCY = [{"own": True}, *grid(step=(2, 4, 8, 16), waves=(0.5, 1, 2, 4, 8), saliency_warps=(2, 4, 8))]
CHOICES |= {f"saliency row C=5 {name}": SALIENCY for name in ("32/32 K=640", "28/4 K=4096")}


def thin(m: int) -> list[Choice]:
    """Launches of products of m rows, which are padded for the tensor cores."""
    padded = (16 if m <= 16 else 32,)
    tensor = grid(rows=padded, block_n=(16, 32, 64), block_k=(64, 128, 256), warps=(1, 2, 4), stages=(3, 5))
    tensor = [c for c in tensor if 1024 <= c["block_n"] * c["block_k"] <= 8192 and c["block_n"] >= 8 * c["warps"]]
    return [{"own": True}, *tensor]


CHOICES |= {case.name: thin(int(case.name.rpartition("=")[2])) for case in LINEARS}


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """The kernels launch with this choice."""
    launch = {name: choice[name] for name in ("M", "N", "num_warps", "num_stages") if name in choice}
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        if "own" in choice:
            pass
        elif "block_n" in choice:
            from vlmfix.kernels.linear import triton as products

            put(products, "launch", lambda *_: products.Launch(**choice))
        elif "waves" in choice:
            put(saliency, "_config", partial(_saliency_config, choice))
        elif "M" in choice:
            put(tiles, "_config", lambda *_: launch)
            put(tiles, "PARTS", getattr(torch, choice.get("parts", ""), None))
            if "splits" in choice:
                put(tiles, "_splits", lambda *_: choice["splits"])
        elif "factor" in choice:
            put(triton, "_shapes", partial(_split_shapes, triton._shapes, launch, choice["factor"]))
        else:
            put(triton_choose, "FEW", choice["few"])
        yield


def _saliency_config(choice: Choice, rows: int, keys: int, _: int, processors: int) -> tuple[int, int, int]:
    most = max(1, int(choice["waves"] * processors / rows))
    return choice["step"], min(most, max(1, keys // choice["step"]), 32), choice["saliency_warps"]


def _split_shapes(
    shapes: Callable[..., Any], launch: Choice, factor: float, q: Tensor, k: Tensor, v: Tensor, kinds: int
) -> tuple[int, int, Choice]:
    rows, splits, own = shapes(q, k, v, kinds)
    return rows, max(1, round(splits * factor)), own | launch


def measure(case: Case, choice: Choice, inputs: list[dict[str, Any]], replays: int) -> Choice:
    """A row of results."""
    try:
        with chosen(choice), torch.no_grad():
            error = case.check(inputs[0])
            if not error <= 1:
                return choice | {"us": None, "failed": "outside the error budget", "error_of_budget": error}
            us = graph_time([partial(case.ours, x) for x in inputs], replays)["us"]
        return choice | {"us": us, "error_of_budget": error}
    except Exception as error:
        return choice | {"us": None, "failed": str(error)[:200]}


def compile_some(job: tuple[str, list[Choice]]) -> None:
    """Compiles some choices of a case into Triton's cache; what fails does so again where it is measured."""
    case = CASES[job[0]]
    torch.manual_seed(0)
    with torch.no_grad(), suppress(Exception):
        inputs = case.inputs()
        for choice in job[1]:
            with suppress(Exception), chosen(choice):
                case.ours(inputs)
    torch.cuda.empty_cache()


def reported(rows: list[Choice]) -> list[Choice]:
    """The fastest first; of many the `BEST`, the kernel's own choice, and the first failure."""
    rows = sorted(rows, key=lambda row: row["us"] or float("inf"))
    if len(rows) <= MANY:
        return rows
    failed = [row for row in rows if row["us"] is None]
    own = [row for row in rows[BEST:] if "own" in row and row["us"] is not None]
    note = [failed[0] | {"failures_like_this": len(failed)}] if failed else []
    return [*(row for row in rows[:BEST] if row["us"] is not None), *own, *note]


def main() -> None:
    """Sweeps the cases and writes all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="starts no further measurement after this")
    options = parser.parse_args()
    begun = time.monotonic()
    end = begun + options.seconds
    todo = {name: choices for name, choices in CHOICES.items() if options.only in name}
    jobs = [(name, some[i : i + TOGETHER]) for name, some in todo.items() for i in range(0, len(some), TOGETHER)]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.map_async(compile_some, jobs, chunksize=1).get(timeout=options.seconds)
    sys.stdout.write(f"compiled in {time.monotonic() - begun:.0f} s\n")
    found: list[dict[str, Any]] = []
    for name, choices in todo.items():
        torch.manual_seed(0)
        with torch.no_grad():
            inputs = [CASES[name].inputs() for _ in range(CASES[name].sets)]
        replays = QUICK_REPLAYS if len(choices) > MANY else REPLAYS
        rows = [measure(CASES[name], choice, inputs, replays) for choice in choices if time.monotonic() < end]
        for row in reported(rows):
            us, rest = row["us"], {k: v for k, v in row.items() if k != "us"}
            sys.stdout.write(f"{name}: {us or 0:.1f} us {json.dumps(rest)}\n")
            found.append({"case": name, **row})
        sys.stdout.flush()
        columns = list(dict.fromkeys(key for row in found for key in row))
        options.out.write_text(json.dumps({**about("cuda"), "columns": columns, "rows": found}, indent=1) + "\n")
    sys.stdout.write(f"took {time.monotonic() - begun:.0f} s\n")


if __name__ == "__main__":
    main()
