"""Candidates of a tuning run: declared values, the same number for every method."""

from __future__ import annotations

import itertools
import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .baselines import methods_of, with_value

Grids = Mapping[str, Mapping[str, Sequence[Any]]]
"""Recipe text -> hyper-parameter (`METHOD.NAME` where the recipe has several methods) -> values."""


def read_grids(path: str | Path) -> dict[str, dict[str, list[Any]]]:
    """Grids of a TOML file: a table per recipe text, a list of values per hyper-parameter.

    Raises:
        UsageError: naming what is wrong.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} is not a readable TOML file: {error}") from error
    for recipe, grid in data.items():
        if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
            raise UsageError(f'{path}: ["{recipe}"] must hold lists of values, as in alpha = [0.5, 1.0]')
    return data


def candidates(grids: Grids, n: int | None = None, seed: int = 0) -> dict[str, list[str]]:
    """The same number of recipe texts for every method, drawn from its grid.

    Args:
        grids: declared values.
        n: candidates per method; the size of the smallest grid by default.
        seed: of the draw from larger grids.

    Raises:
        UsageError: for no grid, a hyper-parameter of no method, or a grid with fewer than n candidates.
    """
    if not grids:
        raise UsageError("nothing to tune; declare a grid for at least one recipe")
    every = {recipe: [_filled(recipe, keys) for keys in _product(grid)] for recipe, grid in grids.items()}
    n = n or min(len(texts) for texts in every.values())
    result = {}
    for recipe, texts in every.items():
        if len(texts) < n:
            raise UsageError(f"the grid of {recipe} has {len(texts)} candidates, {n} are asked for; add values to it")
        kept = sorted(random.Random(f"{seed} {recipe}").sample(range(len(texts)), n))
        result[recipe] = [texts[place] for place in kept]
    return result


def _product(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _filled(recipe: str, values: Mapping[str, Any]) -> str:
    methods = methods_of(recipe)
    for key, value in values.items():
        method, _, name = key.rpartition(".")
        if method not in methods and (method or len(methods) > 1):
            raise UsageError(f"{key!r} in the grid of {recipe!r}: write METHOD.NAME with one of {', '.join(methods)}")
        recipe = with_value(recipe, method or methods[0], name, value)
    return recipe
