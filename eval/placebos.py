"""Recipes whose methods make their choice at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import registry
from ..decoders.placebo import placebo
from ..errors import Refusal
from ..recipe import Recipe, _with_preset


def placebo_recipe(recipe: str, kind: str, seed: int = 0, preset: Mapping[str, dict[str, Any]] | None = None) -> Recipe:
    """The recipe with a placebo for each method that the kind concerns; the other methods stay.

    Args:
        recipe: recipe text.
        kind: one of `baselines.PLACEBOS`.
        seed: of the choice.
        preset: method name -> settings published for the checkpoint, which the placebo shares with the method.

    Raises:
        UsageError: for an unknown kind.
        Refusal: if it concerns no method of the recipe.
    """
    methods = [_with_preset(m, (preset or {}).get(registry.name_of(m), {})) for m in Recipe.parse(recipe).methods]
    made = [placebo(method, kind, seed) for method in methods]
    if not any(made):
        wanted = "a decoding method" if kind == "other-picture" else "an attention method"
        raise Refusal(f"{recipe}: the placebo {kind} needs {wanted}")
    return Recipe(tuple(new or old for new, old in zip(made, methods, strict=True)))
