"""Questions per second of short answers: batch 1, a large batch, and a large batch with the picture's prefix shared.

    python -m benchmarks.throughput --shape llava-7b --out results.json

POPE-style: six questions about each picture, one generated token. Random weights: only rates are measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import vlmfix
from benchmarks.shapes import IMAGE, SHAPES, build
from vlmfix.hf.sharing import share

QUESTIONS = 6


def questions(model: Any, pictures: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of six questions about each picture: 35 tokens, the picture, 20 tokens of question."""
    generator = torch.Generator().manual_seed(2)
    rows, patches = pictures * QUESTIONS, (336 // 14) ** 2
    system = torch.randint(10, 4000, (1, 35), generator=generator).expand(rows, -1)
    asked = torch.randint(10, 4000, (rows, 20), generator=generator)
    ids = torch.cat([system, torch.full((rows, patches), IMAGE), asked], 1)
    pixels = torch.randn(pictures, 3, 336, 336, generator=generator).repeat_interleave(QUESTIONS, 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


class Busy:
    """Share of time in which the GPU ran a kernel, sampled while the block runs; nan without NVML."""

    def __enter__(self) -> Busy:
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self.samples.append(torch.cuda.utilization())
            except Exception:
                return

    @property
    def percent(self) -> float:
        """Mean utilisation in percent."""
        return statistics.mean(self.samples) if self.samples else float("nan")


def rate(vlm: Any, inputs: dict[str, torch.Tensor], batch: int, shared: bool, device: str) -> dict[str, float]:
    """Questions per second over all rows in batches."""
    rows = inputs["input_ids"].shape[0]
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def run(limit: int) -> None:
        for start in range(0, limit, batch):
            part = {name: value[start : start + batch] for name, value in inputs.items()}
            if shared:
                part = share(
                    vlm.parts, part, [str(i // QUESTIONS) for i in range(start, start + len(part["input_ids"]))]
                )
            vlm.generate(**part, max_new_tokens=1)

    run(batch)
    wait()
    started = time.perf_counter()
    with Busy() as busy:
        run(rows)
        wait()
    return {"questions_per_second": rows / (time.perf_counter() - started), "busy_percent": busy.percent}


def main() -> None:
    """Measures the three ways and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and options.shape != "cpu" else "cpu"
    model = build(options.shape, device)
    vlm = vlmfix.wrap(model, None, "greedy")
    few = questions(model, max(1, options.pictures // 16), device)
    many = questions(model, options.pictures, device)
    rows = {
        "batch 1": rate(vlm, few, 1, False, device),
        f"batch {options.batch}": rate(vlm, many, options.batch, False, device),
        f"batch {options.batch}, prefix shared": rate(vlm, many, options.batch, True, device),
    }
    base = rows["batch 1"]["questions_per_second"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "vlmfix": vlmfix.__version__}
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
        "shape": options.shape,
        "columns": ["row", "questions_per_second", "busy_percent", "ratio"],
        "rows": [{"row": name, **row, "ratio": row["questions_per_second"] / base} for name, row in rows.items()],
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stderr.write(json.dumps(report["rows"], indent=1) + "\n")


if __name__ == "__main__":
    main()
