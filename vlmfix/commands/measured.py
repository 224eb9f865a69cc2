"""Results of the benchmarks of speed: read, checked, and judged by the targets that their rows state."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import UsageError

NUMBER = r"\d+(?:\.\d+)?"
BOUND = re.compile(rf"(<=|>=) ({NUMBER})")
"""A bound of a figure."""

NAMED_BOUND = re.compile(rf"(<=|>=) ({NUMBER})(%?) (?:x|of) (\w+)")
"""A bound as text: of the figure `of_NAME`."""

EXPECTED = (
    "give a JSON file that a script in benchmarks/ wrote: `python -m benchmarks.engine --out FILE` makes one, "
    "benchmarks/results/ of a checkout holds some"
)


def read(path: Path) -> dict[str, Any]:
    """Results in a file, with a verdict on every target.

    Args:
        path: a JSON file that a script in benchmarks/ wrote.

    Returns:
        The file's object; rows that state targets hold `targets` in words and `judged`, a list of objects with
        `figure`, `value`, `target` and `met`.

    Raises:
        UsageError: the file cannot be read or holds something else; names the row and the field.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error}); {EXPECTED}") from error
    if not isinstance(data, dict) or not _are(data.get("rows"), dict):
        raise UsageError(f'{path}: no results of a benchmark, which hold a list of objects under "rows"; {EXPECTED}')
    for key, kind, wanted in (("columns", str, "names of figures"), ("runs", dict, "objects, one a run")):
        if key in data and not _are(data[key], kind):
            raise UsageError(f'{path}: "{key}" is {_said(data[key])}; make it a list of {wanted}, or leave it out')
    return {**data, "rows": [_verdict(row, _place(path, row, n)) for n, row in enumerate(data["rows"], 1)]}


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _said(value: Any) -> str:
    return json.dumps(value)[:60]


def _place(path: Path, row: Mapping[str, Any], number: int) -> str:
    return f"{path}: row {number} ({row.get('row', row.get('case', 'without a name'))})"


def _verdict(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row with its targets judged.

    A row states bounds of its own figures, `targets: {"of_plain": "<= 1.05"}`, or one as text, `target: "<= 1.1 x
    sdpa"` or `">= 80% of ideal"`, of the figure `of_sdpa` or `of_ideal`.
    """
    for key in ("run", "prompt", "batch"):
        if key in row and type(row[key]) is not int:
            raise UsageError(f'{place}: "{key}" is {_said(row[key])}; make it a whole number')
    bounds = _bounds(row, place)
    row = {key: value for key, value in row.items() if key != "judged"}
    if not bounds:
        return {key: value for key, value in row.items() if key != "targets"}
    judged = []
    for figure, bound in bounds.items():
        found = BOUND.fullmatch(bound) if isinstance(bound, str) else None
        if not found:
            raise UsageError(f'{place}: the target of "{figure}" is {_said(bound)}; write a bound such as "<= 1.05"')
        value, (sign, limit) = row.get(figure), found.groups()
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f'{place}: "{figure}" is {_said(value)} and has a target; make it a number')
        met = value <= float(limit) if sign == "<=" else value >= float(limit)
        judged.append({"figure": figure, "value": value, "target": bound, "met": met})
    good = sum(each["met"] for each in judged)
    said = f"{good} of {len(judged)} met" if 0 < good < len(judged) else "met" if good else "missed"
    return {**row, "targets": said if judged else "not measured", "judged": judged}


def _bounds(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Bounds by figure."""
    stated, text = row.get("targets") or {}, row.get("target") or ""
    if not isinstance(stated, dict):
        raise UsageError(f'{place}: "targets" is {_said(stated)}; write an object such as {{"of_plain": "<= 1.05"}}')
    bounds = dict(stated)
    if text:
        found = NAMED_BOUND.fullmatch(text) if isinstance(text, str) else None
        if not found:
            raise UsageError(f'{place}: "target" is {_said(text)}; write "<= 1.1 x sdpa" or ">= 80% of ideal"')
        sign, limit, percent, name = found.groups()
        bounds[f"of_{name}"] = f"{sign} {float(limit) / (100 if percent else 1):g}"
    return bounds
