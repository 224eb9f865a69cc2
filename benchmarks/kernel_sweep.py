"""Tries launch configurations of the kernels and prints the fastest; the kernels' own choice is edited by hand.

    python benchmarks/kernel_sweep.py --out sweep.json [--only prefill] [--seconds 90]

Every configuration is compiled first, several at a time, and then timed on its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import ATTENTION, Case
from kernel_operations import OPERATIONS
from kernels import graph_time

from vlmfix.kernels.contrast import triton_choose
from vlmfix.kernels.grouped_attention import tiles, triton

CASES = {case.name: case for case in [*ATTENTION, *OPERATIONS]}
Choice = dict[str, Any]


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


@contextmanager
def chosen(choice: Choice) -> Iterator[None]:
    """The kernels launch with this choice."""
    launch = {name: choice[name] for name in ("M", "N", "num_warps", "num_stages") if name in choice}
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        if "M" in choice:
            put(tiles, "_config", lambda *_: launch)
            put(tiles, "PARTS", getattr(torch, choice.get("parts", ""), None))
            if "splits" in choice:
                put(tiles, "_splits", lambda *_: choice["splits"])
        elif "factor" in choice:
            put(triton, "_shapes", partial(_split_shapes, triton._shapes, launch, choice["factor"]))
        else:
            put(triton_choose, "FEW", choice["few"])
        yield


def _split_shapes(
    shapes: Callable[..., Any], launch: Choice, factor: float, q: Tensor, k: Tensor, v: Tensor, kinds: int
) -> tuple[int, int, Choice]:
    rows, splits, own = shapes(q, k, v, kinds)
    return rows, max(1, round(splits * factor)), own | launch


def measure(case: Case, choice: Choice, inputs: list[dict[str, Any]], timed: bool) -> Choice:
    """A row of results; untimed runs only compile and check."""
    try:
        with chosen(choice), torch.no_grad():
            error = case.check(inputs[0])
            us = graph_time([partial(case.ours, x) for x in inputs])["us"] if timed else None
        return choice | {"us": us, "error_of_budget": error}
    except Exception as error:
        return choice | {"us": None, "failed": str(error)[:200]}


def compile_one(job: tuple[str, Choice]) -> None:
    """Compiles one choice into Triton's cache."""
    torch.manual_seed(0)
    with torch.no_grad():
        measure(CASES[job[0]], job[1], [CASES[job[0]].inputs()], False)


def main() -> None:
    """Sweeps the cases and writes all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="starts no further measurement after this")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    jobs = [(name, choice) for name, choices in CHOICES.items() if options.only in name for choice in choices]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.map_async(compile_one, jobs, chunksize=1).get(timeout=options.seconds)
    found: list[dict[str, Any]] = []
    for name, choices in CHOICES.items():
        if options.only not in name:
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            inputs = [CASES[name].inputs() for _ in range(CASES[name].sets)]
        rows = [measure(CASES[name], choice, inputs, True) for choice in choices if time.monotonic() < end]
        for row in sorted(rows, key=lambda row: row["us"] or float("inf")):
            us, rest = row["us"], {k: v for k, v in row.items() if k != "us"}
            sys.stdout.write(f"{name}: {us or 0:.1f} us {json.dumps(rest)}\n")
            found.append({"case": name, **row})
        sys.stdout.flush()
        columns = list(dict.fromkeys(key for row in found for key in row))
        options.out.write_text(json.dumps({"columns": columns, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
