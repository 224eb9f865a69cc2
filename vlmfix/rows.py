"""Files of rows, JSON lines or tables, read so that one bad line does not spoil the others."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import UsageError, nearest

Row = Mapping[str, Any]
"""Column -> value; strings in a table, anything in JSON."""

_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", *_TABLES)
"""File name endings that can be read."""


def read_rows(path: Path, needed: list[str]) -> Iterator[tuple[int, Row | str]]:
    """Reads a file of rows: JSON objects, one a line, or a table with a header.

    Args:
        path: the file; its ending decides how it is read.
        needed: columns that a table's header must have.

    Yields:
        Line number, and the row or what is wrong with the line and how to mend it.

    Raises:
        UsageError: the file cannot be read, or the table lacks a needed column.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if path.suffix.lower() in _TABLES:
        yield from _table(path, data, needed)
        return
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield line, f'not JSON ({reason}); write one object a line, as in {{"image": "a.jpg", "prompt": "..."}}'
            continue
        yield line, row if isinstance(row, dict) else 'not a JSON object; write {"image": ..., "prompt": ...}'


def _table(path: Path, data: bytes, needed: list[str]) -> Iterator[tuple[int, Row | str]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8; save it as 'CSV UTF-8'") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_TABLES[path.suffix.lower()], strict=True)
    columns = [name or "" for name in reader.fieldnames or []]
    for name in needed:
        if name not in columns:
            remedy = " or ask with --prompt" if name == "prompt" else ""
            raise UsageError(f"{path}: no column {name!r}{nearest(name, columns)}; name it in the first line{remedy}")
    try:
        for row in reader:
            extra = None in row
            yield reader.line_num, "more cells than the header; quote cells that hold the separator" if extra else row
    except csv.Error as error:
        yield reader.line_num, f"not CSV from here on ({error}); check its quotation marks"
