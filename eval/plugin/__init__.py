"""lmms-eval plug-in: `lmms-eval --model vlmfix --model_args model=llava-hf/llava-1.5-7b-hf,method=vcd`."""

from __future__ import annotations

from typing import Any

CLASS_PATH = "vlmfix.eval.plugin.lmms.Vlmfix"


def manifest() -> Any:
    """The manifest that the entry point in the group `lmms_eval.models` returns; imports nothing heavy."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmfix", chat_class_path=CLASS_PATH)
