"""Clocks, the machine's copy bandwidth, and what a results file says of the machine."""

from __future__ import annotations

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
from torch import Tensor
from transformers import DynamicCache

import vlmfix


def wait(device: str) -> None:
    """Returns when the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the device waited for."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy on the device (4 GiB on a GPU), reads and writes counted."""
    size = 2**32 if device.startswith("cuda") else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = [clock(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * size / statistics.median(times)


def about(device: str) -> dict[str, Any]:
    """Command, machine and versions."""
    on_gpu = device.startswith("cuda")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, vlmfix)}
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def two_forwards(model: Any, new: int, inputs: dict[str, Tensor]) -> Tensor:
    """The published way of contrastive decoding: two caches, two forwards one after the other per step.

    Args:
        model: the model.
        new: tokens to generate.
        inputs: a batch of prompts with pictures.

    Returns:
        [batch, new] ids.
    """
    noisy = {**inputs, "pixel_values": inputs["pixel_values"] + torch.randn_like(inputs["pixel_values"])}
    caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
    out: list[Tensor] = []
    with torch.no_grad():
        pair = [
            model(**each, past_key_values=cache, use_cache=True, logits_to_keep=1)
            for each, cache in zip((inputs, noisy), caches, strict=True)
        ]
        while True:
            own, other = (each.logits[:, -1].float() for each in pair)
            floor = own.amax(-1, keepdim=True) - 2.3
            token = (2 * own - other).masked_fill(own < floor, float("-inf")).argmax(-1, keepdim=True)
            out.append(token)
            if len(out) == new:
                return torch.cat(out, 1)
            pair = [model(input_ids=token, past_key_values=cache, logits_to_keep=1) for cache in caches]
