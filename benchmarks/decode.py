"""Prefill and decoding times of methods beside plain generate, ratios taken in one run.

    python benchmarks/decode.py --shape llava-7b --out results.json       # one GPU
    python benchmarks/decode.py --shape cpu --out results.json            # 8 layers, hidden 512

Random weights: only time and memory are measured. ms/token = (t(new) - t(1)) / (new - 1), prefill = t(1), the best of
`--repeats`; plain generate is timed before and after the methods, and ratios are to the better of the two.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmfix

SHAPES: dict[str, dict[str, Any]] = {
    "llava-7b": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32064,
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        "dtype": torch.bfloat16,
    },
    "cpu": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "vocab_size": 4096,
        },
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 336,
            "patch_size": 14,
        },
        "dtype": torch.float32,
    },
}
IMAGE = 9
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


def build(shape: str, device: str, attention: str = "sdpa") -> Any:
    """A randomly initialised model of a shape on a device."""
    spec = SHAPES[shape]
    config = LlavaConfig(
        text_config=LlamaConfig(**spec["text"], max_position_embeddings=8192),
        vision_config=CLIPVisionConfig(**spec["vision"]),
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=spec["dtype"], attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(model: Any, batch: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """A prompt of `length` tokens, 576 of them one picture's, in every row."""
    generator = torch.Generator().manual_seed(1)
    patches = (336 // 14) ** 2
    text = torch.randint(10, 4000, (batch, length - patches), generator=generator)
    ids = torch.cat([text[:, :16], torch.full((batch, patches), IMAGE), text[:, 16:]], 1)
    pixels = torch.randn(batch, 3, 336, 336, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def clock(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the device waited for."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


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


def two_forwards(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[int], Any]:
    """The published way of contrastive decoding: two caches, two forwards one after the other per step."""

    @torch.no_grad()
    def run(new: int) -> torch.Tensor:
        noisy = {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}
        caches = [DynamicCache(config=model.config.text_config) for _ in range(2)]
        pair = [
            model(**each, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for each, cache in zip((inputs, noisy), caches, strict=True)
        ]
        out = []
        for _ in range(new):
            own, other = (each.logits[:, -1].float() for each in pair)
            floor = own.amax(-1, keepdim=True) - 2.3
            token = (2 * own - other).masked_fill(own < floor, float("-inf")).argmax(-1, keepdim=True)
            out.append(token)
            if len(out) < new:
                pair = [model(input_ids=token, past_key_values=cache, logits_to_keep=1) for cache in caches]
        return torch.cat(out, 1)

    return run


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy on the device, reads and writes counted."""
    size = 2**30 if device.startswith("cuda") else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = [clock(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * size / statistics.median(times)


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
    weights = sum(p.numel() * p.element_size() for p in model.model.language_model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * model.get_input_embeddings().weight.element_size()
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vlmfix": vlmfix.__version__,
        },
        "shape": options.shape,
        "length": options.length,
        "copy_bytes_per_second": rate,
        "weight_read_floor_ms": 1e3 * weights / rate,
        "rows": [],
    }
    settings = {"do_sample": False}
    for batch in options.batches:
        inputs = prompt(model, batch, options.length, device)
        cases: list[tuple[str, Callable[[], Callable[[int], Any]]]] = [
            ("transformers sdpa", lambda i=inputs: lambda n: model.generate(**i, max_new_tokens=n, **settings)),
            ("two sequential forwards", lambda i=inputs: two_forwards(model, i)),
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
