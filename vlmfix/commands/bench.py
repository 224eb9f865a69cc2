"""`vlmfix bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmfix.commands.console import emit, note, show, table
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError


def bench(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the scripts in benchmarks/ wrote.")],
    as_json: Json = False,
) -> None:
    """Print the results of the benchmarks of speed: one table a file, with the machine and versions it was made on.

    The scripts in benchmarks/ of a checkout measure (decode.py: prefill and decoding, kernels.py: single operations).
    """
    found = {str(path): _read(path) for path in files}
    if as_json:
        emit(found)
        return
    for name, data in found.items():
        rows = [_flat(row) for row in data["rows"]]
        heads = list(dict.fromkeys(key for row in rows for key in row))
        show(table(heads, ([_cell(row.get(key)) for key in heads] for row in rows), name))
        about = {key: value for key, value in _flat(data).items() if key != "rows"}
        note(", ".join(f"{key} {value}" for key, value in about.items()))


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
