"""Grids: which benchmarks, methods, seeds and controls make a table, read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import UsageError, nearest
from .baselines import GREEDY, NO_CONTRAST, PLACEBOS, Arm, controls, methods_of, placebos, split, trivial

CONTROLS = ("trivial", "placebo")
FIRST = ("var", "vcd", "m3id")
"""Methods that lead where all are asked for."""


@dataclass(frozen=True)
class Grid:
    """What `vlmfix eval` runs.

    Args:
        benchmarks: name -> options of the benchmark.
        methods: recipe texts, a list or one text with `;` between; `greedy` need not be given, `all` stands for every
            registered method at its defaults.
        model: Hub id, folder or `pico`.
        images: folder of the pictures.
        protocol: picture protocol, `hf` or `paper`.
        seeds: seeds of sampled rows; other rows run once.
        controls: further rows: `trivial`, `placebo`.
        limit: only the first items of each benchmark.
        batch_size: items answered together.
        generation: settings of every row; `max_new_tokens` is the benchmark's unless given.
        load: how the model is loaded (dtype, device_map, revision, ...).
        columns: metrics to print; all by default.
    """

    benchmarks: Mapping[str, Mapping[str, Any]]
    methods: Sequence[str] = ()
    model: str = "pico"
    images: str = ""
    protocol: str = "hf"
    seeds: Sequence[int] = (0,)
    controls: Sequence[str] = ()
    limit: int | None = None
    batch_size: int = 8
    generation: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise UsageError('a grid names at least one benchmark: benchmarks = ["pope"]')
        for name in self.controls:
            if name not in CONTROLS:
                raise UsageError(f"unknown control {name!r}{nearest(name, CONTROLS)}")
        if self.protocol not in ("hf", "paper"):
            raise UsageError(f"unknown picture protocol {self.protocol!r}{nearest(self.protocol, ('hf', 'paper'))}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")


_TYPES: Mapping[str, tuple[type, ...]] = {
    "benchmarks": (list, dict), "methods": (list, str), "model": (str,), "images": (str,), "protocol": (str,),
    "seeds": (list, int), "controls": (list,), "limit": (int,), "batch_size": (int,), "generation": (dict,),
    "load": (dict,), "columns": (list,),
}  # fmt: skip


def read(path: str | Path) -> Grid:
    """The grid of a TOML file.

    Raises:
        UsageError: naming the file and the wrong key, value or line.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    try:
        return parse(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse(data: Mapping[str, Any]) -> Grid:
    """The grid of a dictionary; options of a benchmark stand in a table `[benchmark.NAME]`.

    Raises:
        UsageError: for an unknown key, with the nearest one, or a value of the wrong type.
    """
    values, options = dict(data), data.get("benchmark", {})
    values.pop("benchmark", None)
    known = [f.name for f in fields(Grid)]
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"unknown key {key!r}{nearest(key, [*known, 'benchmark'])}")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            wanted = " or ".join(
                {list: "a list", dict: "a table", str: "a text", int: "a number"}[t] for t in _TYPES[key]
            )
            raise UsageError(f"{key} must be {wanted}, is {value!r}")
    names = values.get("benchmarks", list(options))
    given = dict(names) if isinstance(names, dict) else {str(name): {} for name in names}
    for name in options:
        if name not in given:
            raise UsageError(f"options for the benchmark {name!r}, which is not in benchmarks{nearest(name, given)}")
    values["benchmarks"] = {name: {**own, **options.get(name, {})} for name, own in given.items()}
    if isinstance(values.get("methods"), str):
        values["methods"] = [text.strip() for text in split(values["methods"], ";") if text.strip()]
    values["methods"] = named(values.get("methods", ()))
    if isinstance(values.get("seeds"), int):
        values["seeds"] = list(range(values["seeds"]))
    return Grid(**values)


def named(methods: Sequence[str]) -> list[str]:
    """Recipe texts with `all` replaced by every registered method that does something, `FIRST` leading."""
    names = [row.name for row in registry.ROWS if row.kind != "plain"]
    every = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    return list(dict.fromkeys(text for given in methods for text in (every if given == "all" else [given])))


def contrastive() -> dict[str, str]:
    """Registered contrastive methods and the names of their strengths: decoding methods with a plausibility mask."""
    found = {row.name: next(iter(row.defaults), "") for row in registry.ROWS if row.kind == "decoding"}
    masked = {row.name for row in registry.ROWS if "beta" in row.defaults}
    return {name: key for name, key in found.items() if name in masked and key in NO_CONTRAST}


def arms(grid: Grid, captions: bool, contrastive: Mapping[str, str], offset: float | None = None) -> list[Arm]:
    """Every row of a grid's table, greedy first.

    Contrastive recipes always bring sampling and sampling with the mask alone.

    Args:
        grid: the grid.
        captions: whether the benchmark asks for descriptions; else for yes or no.
        contrastive: contrastive method -> name of its strength, see `contrastive`.
        offset: threshold on the yes-no margin from the tuning split, for the trivial baselines.
    """
    recipes = [text for text in dict.fromkeys(grid.methods) if methods_of(text) != ["greedy"]]
    rows = [GREEDY, *controls(recipes, contrastive)]
    if "trivial" in grid.controls:
        rows += trivial(captions, offset=offset)
    decoding = {row.name for row in registry.ROWS if row.kind != "attention"}
    for recipe in recipes:
        rows.append(Arm(recipe, "method", recipe))
        if "placebo" in grid.controls:
            names = set(methods_of(recipe))
            kinds = ["other-picture"] if names & set(contrastive) else []
            kinds += [kind for kind in PLACEBOS if kind != "other-picture"] if names - decoding else []
            rows += placebos(recipe, kinds)
    return rows
