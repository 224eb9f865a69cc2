"""`vlmfix env`."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from vlmfix import __version__
from vlmfix.commands.console import emit, show, table
from vlmfix.commands.options import Json

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
    "pycocotools",
)


def env(as_json: Json = False) -> None:
    """Print what decides results and belongs into a report of a problem."""
    facts = gather()
    if as_json:
        emit(facts)
    else:
        show(table(["", ""], ((key, str(value)) for key, value in facts.items())))


def gather() -> dict[str, Any]:
    """Versions, platform and devices."""
    facts: dict[str, Any] = {"vlmfix": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts | _devices()


def _devices() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {}
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda or "none"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
