"""vlmfix: vision-language models hallucinate less while they decode, without training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "load": "vlmfix.api",
    "wrap": "vlmfix.api",
    "applied": "vlmfix.api",
    "record": "vlmfix.api",
    "FixedVLM": "vlmfix.api",
    "Answer": "vlmfix.api",
    "Recipe": "vlmfix.recipe",
    "Refusal": "vlmfix.errors",
    "VlmfixError": "vlmfix.errors",
}
__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from vlmfix.api import Answer as Answer
    from vlmfix.api import FixedVLM as FixedVLM
    from vlmfix.api import applied as applied
    from vlmfix.api import load as load
    from vlmfix.api import record as record
    from vlmfix.api import wrap as wrap
    from vlmfix.errors import Refusal as Refusal
    from vlmfix.errors import VlmfixError as VlmfixError
    from vlmfix.recipe import Recipe as Recipe


def __getattr__(name: str) -> Any:
    """Loads public names, and methods by class name (`vlmfix.VAR`), on first use: importing vlmfix imports no torch."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name[:1].isupper():
        registry = importlib.import_module("vlmfix.registry")
        row = next((row for row in registry.ROWS if row.class_name == name), None)
        if row is not None:
            return row.load()
    raise AttributeError(f"module 'vlmfix' has no attribute {name!r}")


def __dir__() -> list[str]:
    registry = importlib.import_module("vlmfix.registry")
    return sorted([*__all__, *(row.class_name for row in registry.ROWS)])
