"""`vlmfix bench`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfix.commands.console import emit, note, show, table
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError

BOUND = re.compile(r"(<=|>=) ([\d.]+)(%?) (?:x|of) (\w+)")
"""A bound as text: of the figure `of_NAME`."""

NAMES = ("row", "case", "prompt", "batch")
"""What a row is called by."""

COLUMNS = ("case", "ours.us", "ideal_us", "of_ideal", "of_sdpa", "of_flex", "of_torch", "host_us", "failed", "targets")
"""Of results that have cases and do not say which columns to show."""


def bench(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the scripts in benchmarks/ wrote.")],
    as_json: Json = False,
) -> None:
    """Print the results of the benchmarks of speed: tables, with the machine and versions they were made on.

    The scripts in benchmarks/ of a checkout measure (engine.py: prefill and decoding under both engines and beside
    transformers' own ways, kernels.py: single operations). Where rows state targets, a column says how many of
    those measured were met, and a table lists the missed ones.
    """
    found = {str(path): _judged(_read(path)) for path in files}
    if as_json:
        emit(found)
        return
    for name, data in found.items():
        rows = [_flat(row) for row in data["rows"]]
        _show(rows, name, data.get("columns") or [key for key in COLUMNS if any("case" in row for row in rows)])
        missed = [_named(row) | judged for row in data["rows"] for judged in row.get("judged", ()) if not judged["met"]]
        notes = [_named(row) | {"note": row["note"]} for row in rows if "columns" in data and row.get("note")]
        others = {key: value for key, value in data.items() if key not in ("rows", "runs") and _is_table(value)}
        for title, more in {"targets missed": missed, "notes": notes, **others}.items():
            _show([_flat(row) for row in more], f"{name}: {title.replace('_', ' ')}")
        for about in (data, *data.get("runs", ())):
            note(", ".join(f"{key} {value}" for key, value in _flat(about).items()))


def _show(rows: Sequence[Mapping[str, Any]], title: str, heads: Sequence[str] = ()) -> None:
    known = list(dict.fromkeys(key for row in rows for key in row))
    heads = [key for key in heads if key in known] or known
    if rows:
        show(table(heads, ([_cell(row.get(key)) for key in heads] for row in rows), title))


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in NAMES if key in row}


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _judged(data: dict[str, Any]) -> dict[str, Any]:
    """Results with a verdict on every stated target."""
    return {**data, "rows": [_verdict(row) for row in data["rows"]]}


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its targets judged.

    A row states bounds of its own figures, `targets: {"of_plain": "<= 1.05"}`, or one as text, `target: "<= 1.1 x
    sdpa"` or `">= 80% of ideal"`, of the figure `of_sdpa` or `of_ideal`.
    """
    bounds = dict(row["targets"]) if isinstance(row.get("targets"), dict) else {}
    if text := BOUND.fullmatch(str(row.get("target", ""))):
        sign, limit, percent, name = text.groups()
        bounds[f"of_{name}"] = f"{sign} {float(limit) / (100 if percent else 1):g}"
    if not bounds:
        return {key: value for key, value in row.items() if key != "targets"}
    judged = []
    for figure, bound in bounds.items():
        sign, limit = bound.split()
        value = row.get(figure)
        if value is not None:
            met = value <= float(limit) if sign == "<=" else value >= float(limit)
            judged.append({"figure": figure, "value": value, "target": bound, "met": met})
    met = sum(each["met"] for each in judged)
    said = f"{met} of {len(judged)} met" if 0 < met < len(judged) else "met" if met else "missed"
    said = said if judged else "not measured"
    return {**row, "targets": said, "judged": judged}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f'{path}: no results of a benchmark; they hold a list under "rows"')
    return dict(data)


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Numbers and texts of a row, those of objects within it as `object.key`; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif not isinstance(value, list):
            flat[f"{before}{key}"] = value
    return flat


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
