"""Finding the cases of a folder of vectors, and comparing."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmfix import registry

FIXTURES = Path(__file__).parent / "data"
ATTENTION, MODEL = 1e-5, 3e-5
"""Absolute tolerances: one attention operation, a whole tiny model."""


@dataclass(frozen=True)
class Case:
    """One case: `<slug>/<name>.json` describes the arrays of `<slug>/<name>.safetensors`."""

    slug: str
    path: Path

    def check(self) -> None:
        info: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        arrays = load_file(self.path.with_suffix(".safetensors"))
        module = adapter(self.slug)
        assert module is not None, f"no adapter tests/golden/adapters/{self.slug}.py for the method {self.slug!r}"
        module.check(info, arrays, self.path.parent)


def folder() -> Path:
    """Where the vectors are: VLMFIX_GOLDEN, or the fixtures of the project."""
    given = os.environ.get("VLMFIX_GOLDEN")
    path = Path(given) if given else FIXTURES
    if not path.is_dir():
        raise FileNotFoundError(f"VLMFIX_GOLDEN={given}: no such folder")
    return path


def slugs(root: Path) -> tuple[list[str], list[str]]:
    """Names of sub-folders: those to check (an adapter or a registry row exists), and unknown ones."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    rows = {row.name for row in registry.ROWS}
    ours = [name for name in names if name in rows or adapter(name) is not None]
    return ours, [name for name in names if name not in ours]


def find(root: Path, slug: str) -> list[Case]:
    """Cases of one method: every JSON file that has arrays beside it, or that has lost them."""
    files = sorted((root / slug).glob("*.json"))
    return [Case(slug, path) for path in files if path.name != "model_config.json"]


def adapter(slug: str) -> ModuleType | None:
    """The module that knows a method's cases."""
    name = f"{__package__}.adapters.{slug}"
    return import_module(name) if util.find_spec(name) else None


def close(actual: Tensor, expected: Tensor, atol: float, what: str, rtol: float = 0.0) -> None:
    """Equal within a tolerance, infinities and shapes exactly."""
    actual, expected = actual.double(), expected.double()
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


def same(actual: Any, expected: Any, what: str) -> None:
    """Equal exactly."""
    equal = torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
    assert equal, f"{what}: got {actual}, expected {expected}"
