"""Benchmarks: questions, truth and scorer of each in one file, found by name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import UsageError, nearest
from ..base import Item, Score
from .answers import Reply
from .files import Problems

REGISTRY: Mapping[str, str] = {
    "pope": "pope:Pope",
    "chair": "chair:Chair",
    "amber": "amber:Amber",
    "mme": "mme:Mme",
    "hallusion": "hallusion:Hallusion",
    "mmhal": "mmhal:Mmhal",
    "vqa": "vqa:Vqa",
    "text": "text:Text",
}
"""Name -> module of this package and class; nothing is imported before it is asked for."""


class Benchmark(Protocol):
    """What every benchmark offers; its constructor takes the options, all of which may be given as text."""

    @property
    def label(self) -> str:
        """Name with scorer variant, printed with every figure."""

    @property
    def max_new_tokens(self) -> int:
        """Token limit of the published protocol."""

    def items(self) -> list[Item]:
        """What to ask about which pictures."""

    def replies(self, records: Iterable[Mapping[str, Any]], problems: Problems) -> list[Reply]:
        """Items with their answers; everything else is named in `problems`."""

    def score(self, records: Iterable[Mapping[str, Any]], problems: Problems | None = None) -> Score:
        """Scores answer records; needs neither model nor GPU."""


def find(name: str) -> type[Any]:
    """The class of a benchmark.

    Raises:
        UsageError: for an unknown name, with the nearest ones.
    """
    if name not in REGISTRY:
        raise UsageError(f"unknown benchmark {name!r}{nearest(name, REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(f".{module}", __name__), attribute)
    return found


def load(name: str, **options: Any) -> Benchmark:
    """A benchmark with its options.

    Args:
        name: one of `REGISTRY`.
        options: fields of its class; texts are read as the field's type where it is a number.

    Raises:
        UsageError: for an unknown name or option, a missing option or an impossible value.
    """
    kind = find(name)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise UsageError(f"{name} has no option {key!r}{nearest(key, fields)}")
        number = "int" in str(fields[key].type).replace("|", " ").split()
        if number and isinstance(value, str):
            if not value.strip().isdigit():
                raise UsageError(f"option {key} of {name} must be a whole number, is {value!r}")
            value = int(value)
        values[key] = value
    missing = [
        key
        for key, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and key not in values
    ]
    if missing:
        wanted = " and ".join(f"--option {key}=..." for key in missing)
        raise UsageError(f"{name} needs {' and '.join(missing)}; give {wanted}{_truth(name, missing)}")
    made: Benchmark = kind(**values)
    return made


def _truth(name: str, missing: Sequence[str]) -> str:
    """Where else the command line takes what is missing, if that is annotations."""
    from ..drawn import TRUTH

    return ", --truth PATH to score, or --images scenes to answer" if TRUTH.get(name) in missing else ""


def score_file(path: str | Path, benchmark: str, format: str = "auto", **options: Any) -> Score:
    """Scores a file of answers, ours or another tool's.

    Args:
        path: answer records, or a log that `vlmfix.eval.importers` reads.
        benchmark: one of `REGISTRY`.
        format: of the file, one of `importers.FORMATS`; found out by default.
        options: of the benchmark.
    """
    from ..importers import read_answers

    made, problems = load(benchmark, **options), Problems()
    return made.score(read_answers(path, problems, format), problems)
