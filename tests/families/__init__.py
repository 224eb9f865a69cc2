"""Tiny random VLMs of every family, built from configs: no download, well under a second each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from . import blocks, llava, others, patches, qwen, refused, tiles
from .core import Family, Inputs, TinyVLM, construct, released

REQUIRED = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "paligemma",
    "gemma3",
    "mistral3",
    "got_ocr2",
    "instructblip",
)
"""Families every method must work on."""

MAIN = ("llava", "qwen2_5_vl", "idefics3")
"""Plain, M-RoPE and several runs per picture: where the whole matrix runs."""

SPECS: Mapping[str, Family] = {
    spec.name: spec for group in (llava, qwen, tiles, blocks, patches, others) for spec in group.FAMILIES
}
FAMILIES = (*REQUIRED, *sorted(name for name in SPECS.keys() - set(REQUIRED) if released(SPECS[name].min_transformers)))
"""Names of all families that the installed transformers has, the required ones first."""


REFUSED = tuple(spec.name for spec in refused.FAMILIES)
"""Names of families that `build` makes too and vlmfix refuses."""

_BUILDERS = {**SPECS, **{spec.name: spec for spec in refused.FAMILIES}}


def build(family: str, seed: int = 0, fresh: bool = False, **over: Any) -> TinyVLM:
    """A tiny random model of a family.

    Args:
        family: transformers' model_type, one of `FAMILIES` or `REFUSED`.
        seed: of the weights.
        fresh: a new model; otherwise the same one for the same arguments, which the caller must leave as it was.
        over: config values to replace, nested: `text_config={"num_hidden_layers": 8}`.
    """
    if family not in _BUILDERS:
        raise KeyError(f"no builder for {family!r}; there are {', '.join(_BUILDERS)}")
    if fresh:
        return construct(_BUILDERS[family], seed, over)
    return _shared(family, seed, json.dumps(over, sort_keys=True))


@cache
def _shared(family: str, seed: int, over: str) -> TinyVLM:
    return construct(_BUILDERS[family], seed, json.loads(over))


__all__ = ["FAMILIES", "MAIN", "REFUSED", "REQUIRED", "SPECS", "Family", "Inputs", "TinyVLM", "build"]
