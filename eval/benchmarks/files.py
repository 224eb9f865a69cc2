"""Reading what others wrote: JSON in every shape, packed data files, all oddities counted and named."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from ...errors import UsageError

DATA = Path(__file__).resolve().parent.parent / "data"
"""Data shipped with the package; see its README.md for sources and licences."""


class Problems:
    """What was not scored as usual: kind -> names, in order of appearance."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}

    def add(self, kind: str, name: object) -> None:
        """Notes one case of a kind."""
        self.kinds.setdefault(kind, []).append(str(name))

    def lines(self, shown: int = 20) -> tuple[str, ...]:
        """One line a kind: how many, and the first of them by name."""
        return tuple(
            f"{len(names)} {kind}: {', '.join(names[:shown])}"
            + (f" and {len(names) - shown} more" if len(names) > shown else "")
            for kind, names in self.kinds.items()
        )


def read_text(path: str | Path) -> str:
    """The text of a file, unpacked if its name ends in .gz.

    Raises:
        UsageError: naming a file that is missing or not UTF-8 text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name a file in it") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}); convert it") from None


def read_json(path: str | Path) -> Any:
    """The one JSON value of a file.

    Raises:
        UsageError: naming the file and place of broken JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error.msg} in line {error.lineno}; fetch the file again") from None


@functools.cache
def shipped(name: str) -> Any:
    """The value of a packed data file `NAME.json.gz` of the package; shared, not to be changed."""
    return read_json(DATA / f"{name}.json.gz")


def read_objects(path: str | Path, problems: Problems) -> list[dict[str, Any]]:
    """Objects of a file: JSON lines, one array, or pretty-printed objects one after the other.

    Args:
        path: the file, packed with gzip or not.
        problems: takes lines that hold no object, named `FILE:LINE`.

    Raises:
        UsageError: if there is no object at all.
    """
    text = read_text(path)
    found = _lines(text, Path(path).name, problems)
    if not found:
        raise UsageError(f"{path} holds no JSON object; expected one object a line, or an array of objects")
    return found


def _lines(text: str, name: str, problems: Problems) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except ValueError:
        pass
    else:
        rows = whole if isinstance(whole, list) else [whole]
        for place, row in enumerate(rows):
            if not isinstance(row, dict):
                problems.add("array entries that are no objects", f"{name}[{place}]")
        return [row for row in rows if isinstance(row, dict)]
    good, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            value = _object(line)
            if value is None:
                bad.append(f"{name}:{number}")
            else:
                good.append(value)
    if not good:
        return _concatenated(text, name, problems)
    for where in bad:
        problems.add("malformed JSON lines", where)
    return good


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _concatenated(text: str, name: str, problems: Problems) -> list[dict[str, Any]]:
    """Objects that span lines; after broken text it goes on at the next line that opens an object."""
    decoder, place, found = json.JSONDecoder(), 0, []
    while (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
            found.append(value)
        except ValueError:
            problems.add("malformed JSON objects", f"{name}:{text.count(chr(10), 0, place) + 1}")
            following = text.find("\n{", place)
            place = following + 1 if following >= 0 else len(text)
    return found
