"""Settings published for particular checkpoints."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _all() -> dict[str, Any]:
    text = files(__name__).joinpath("checkpoints.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def preset(checkpoint: str) -> dict[str, dict[str, Any]]:
    """Method name -> settings for a checkpoint, matched by the last part of its name; empty where none is known."""
    last = checkpoint.rstrip("/").rpartition("/")[2].lower()
    found: dict[str, dict[str, Any]] = {}
    for entry in _all()["presets"]:
        if last in (name.lower() for name in entry["checkpoints"]):
            for method, settings in entry["methods"].items():
                found.setdefault(method, {}).update(settings)
    return found
