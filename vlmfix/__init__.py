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
    from vlmfix.api import Answer, FixedVLM, applied, load, record, wrap
    from vlmfix.errors import Refusal, VlmfixError
    from vlmfix.recipe import Recipe


def __getattr__(name: str) -> Any:
    """Loads public names, and methods by class name (`vlmfix.VAR`), on first use, so that importing vlmfix imports no torch."""
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
