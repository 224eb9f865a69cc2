"""Tries launch configurations of grouped attention and prints the fastest; the kernels' own choice is edited by hand.

python benchmarks/kernel_sweep.py --out sweep.json [--only prefill]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import ATTENTION, Case, grouped
from kernels import graph_time

from vlmfix.kernels.grouped_attention import triton, triton_tiles

DECODE = ("decode B=1 32/32 K=640", "decode B=1 28/4 K=640", "decode B=8 32/32 K=4096", "decode B=8 32/8 K=4096")
PREFILL = ("prefill B=4 32/32 4096", "prefill B=4 32/32 4096 slopes")


def split_configurations(case: Case) -> Iterator[dict[str, Any]]:
    """Keys per step, warps, stages, and splits as a multiple of the kernel's choice."""
    for step, warps, stages, factor in itertools.product((32, 64, 128), (4, 8), (2, 3, 4), (0.5, 1, 2)):
        if step * stages <= 256 and not (factor != 1 and stages != 3):
            yield {"N": step, "num_warps": warps, "num_stages": stages, "splits": factor}


def tile_configurations(case: Case) -> Iterator[dict[str, Any]]:
    """Rows, keys, warps and stages of a tile."""
    for rows, step, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        fits = 2 * (rows + 2 * step * stages) * 128 <= 220 << 10
        if fits and not (rows == 128 and warps == 4) and not (rows == 64 and step == 128):
            yield {"M": rows, "N": step, "num_warps": warps, "num_stages": stages}


def sweep(case: Case, configurations: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times of all configurations, fastest first."""
    torch.manual_seed(0)
    inputs = [case.inputs() for _ in range(case.sets)]
    shapes, config, rows = triton._shapes, triton_tiles._config, []

    def split_shapes(
        chosen: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, kinds: int
    ) -> tuple[int, int, dict[str, int]]:
        count, splits, own = shapes(q, k, v, kinds)
        return count, max(1, round(splits * chosen["splits"])), own | {n: chosen[n] for n in own if n in chosen}

    for chosen in configurations:
        if "splits" in chosen:
            triton._shapes = partial(split_shapes, chosen)
        else:
            triton_tiles._config = lambda q, v, chosen=chosen: chosen
        try:
            error = case.check(inputs[0])
            time = graph_time([partial(grouped, x) for x in inputs])["us"] if error <= 1 else None
            rows.append(chosen | {"us": time, "error_of_budget": error})
        except Exception as error:
            rows.append(chosen | {"us": None, "failed": str(error)[:200]})
    triton._shapes, triton_tiles._config = shapes, config
    return sorted(rows, key=lambda row: row["us"] or float("inf"))


def main() -> None:
    """Sweeps the cases and writes all times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    results = {}
    for case in ATTENTION:
        if options.only not in case.name or case.name not in (*DECODE, *PREFILL):
            continue
        make = split_configurations if case.name in DECODE else tile_configurations
        with torch.no_grad():
            results[case.name] = sweep(case, make(case))
        best = "; ".join(f"{row['us'] or 0:.1f} us {_short(row)}" for row in results[case.name][:4])
        sys.stdout.write(f"{case.name}: {best}\n")
        sys.stdout.flush()
        options.out.write_text(json.dumps(results, indent=1))


def _short(row: dict[str, Any]) -> str:
    return ",".join(f"{name}={row[name]}" for name in ("M", "N", "num_warps", "num_stages", "splits") if name in row)


if __name__ == "__main__":
    main()
