"""`vlmfix bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from vlmfix.commands.console import emit, note, screen, show, table
from vlmfix.commands.measured import read
from vlmfix.commands.options import Json

Row = Mapping[str, Any]

NAMES = ("row", "case", "recipe", "family", "method", "one", "other")
"""What a row is called by: repeated where a table goes on in another one."""

CELL = ("prompt", "batch", "run")
"""What the title of a table of rows says."""

KERNELS = ("case", "ours.us", "ideal_us", "of_ideal", "of_sdpa", "of_flex", "of_torch", "host_us", "failed", "targets")
"""Columns of results that have cases and do not say which columns to show."""

HEADS = {
    "ms_per_token": ("ms", "per token"),
    "prefill_ms": ("prefill", "ms before the first token"),
    "peak_gib": ("GiB", "most memory allocated"),
    "of_plain": ("x plain", "multiple of the engine's own greedy decoding (of 5 beams for opera)"),
    "of_sdpa": ("x sdpa", "of transformers' sdpa"),
    "of_static": ("x static", "of its compiled static cache"),
    "of_two_forwards": ("x two", "of two sequential forwards"),
    "of_floor": ("x floor", "of reading the weights at the copy bandwidth of the run"),
    "of_bytes": ("x bytes", "of reading weights and keys/values at it"),
    "of_plain_and_bytes": ("x plain+bytes", "x plain over what more bytes explain"),
    "memory_of_sdpa": ("mem", "GiB over those of transformers' sdpa"),
    "capture_seconds": ("capture", "s to capture a step"),
    "seconds_per_answer": ("s/answer", "s per answer after the first"),
}
"""Figures of results that say which columns to show: figure -> its head and what it means."""

TITLES = {"answers": "seconds to the first 1, 10, ... answers"}

TEXT = 30
"""Characters of a line at which a column of texts may be broken."""


def bench(
    files: Annotated[list[Path], typer.Argument(help="JSON files that the scripts in benchmarks/ wrote.")],
    as_json: Json = False,
) -> None:
    """Print the results of the benchmarks of speed: tables, with the machine and versions they were made on.

    The scripts in benchmarks/ of a checkout measure (engine.py: prefill and decoding under both engines and beside
    transformers' own ways, kernels.py: single operations). Where rows state targets, a column says how many of
    those measured were met, and a table lists the missed ones. Rows of the latest run come first.
    """
    found = {str(path): read(path) for path in files}
    if as_json:
        emit(found)
        return
    for name, data in found.items():
        screen().print(Text(name, style="bold"), soft_wrap=True)
        _show_rows(data)
        for title, rows in _others(data).items():
            _show(rows, title)
        _about(data)


def _show_rows(data: Row) -> None:
    """A table for each cell and run, the latest run first; under the first one what its heads mean."""
    brief = "columns" in data
    rows = sorted((_flat(row) for row in data["rows"]), key=lambda row: (-row.get("run", 0), *_cell_of(row)))
    cases = [row["case"] for row in rows if "case" in row]
    titled = ("case", *CELL) if len(set(cases)) < len(cases) else CELL  # where each case is swept, it has its table
    wanted = data.get("columns") or (KERNELS if cases else ())
    heads = [_head(key, brief) for key in wanted if key not in titled]
    tables = groupby(rows, lambda row: [row.get(key) for key in titled])
    for number, (cell, group) in enumerate(tables):
        said = [
            str(name) if key == "case" else f"{key} {name}"
            for key, name in zip(titled, cell, strict=True)
            if name is not None
        ]
        left = [{_head(key, brief): value for key, value in row.items() if key not in titled} for row in group]
        _show(left, ", ".join(said) or "rows", heads)
        if number or not brief:
            continue
        known = {key for row in rows for key in row if key in wanted}
        known |= {each["figure"] for row in data["rows"] for each in row.get("judged", ())}
        if meant := [HEADS[key] for key in HEADS if key in known]:
            show(Text("\n".join(f"{head}: {meaning}" for head, meaning in meant), style="dim"))


def _cell_of(row: Row) -> tuple[int, ...]:
    return tuple(row.get(key, -1) for key in CELL)


def _others(data: Row) -> dict[str, list[dict[str, Any]]]:
    """Tables beside that of all rows: title -> rows."""
    brief = "columns" in data
    rows = sorted(data["rows"], key=lambda row: -row.get("run", 0))
    missed = [
        {
            **_named(row),
            "figure": _head(each["figure"], brief),
            "value": f"{each['value']:.4g}",
            "target": each["target"],
        }
        for row in rows
        for each in row.get("judged", ())
        if not each["met"]
    ]
    notes = [_named(row) | {"note": row["note"]} for row in rows if brief and row.get("note")]
    more = {
        TITLES.get(key, key.replace("_", " ")): [
            {_head(name, brief): each for name, each in row.items()} for row in value
        ]
        for key, value in data.items()
        if key not in ("rows", "runs") and _is_table(value)
    }
    return {"targets missed": missed, "notes": notes, **more}


def _about(data: Row) -> None:
    """What a file and its runs say of themselves, on stderr."""
    lines = [("", data), *((f"run {number}: ", run) for number, run in enumerate(data.get("runs", ())))]
    for before, said in lines:
        if about := ", ".join(f"{key} {value}" for key, value in _flat(said).items()):
            note(before + about)


def _named(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("row", "case", *CELL) if key in row}


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _show(rows: Sequence[Row], title: str, wanted: Sequence[str] = ()) -> None:
    """Prints rows without what none of them has; what does not fit beside each other comes in further tables."""
    rows = [_flat(row) for row in rows]
    known = [
        key for key in dict.fromkeys(key for row in rows for key in row) if any(_cell(row.get(key)) for row in rows)
    ]
    heads = [key for key in wanted if key in known] or sorted(known, key=lambda key: key == "note")
    names = [key for key in heads if key in NAMES] or heads[:1]
    width = screen().width
    for number, part in enumerate(_parts(rows, names, [key for key in heads if key not in names], width)):
        screen().print(Text(f"\n{title}{', continued' * bool(number)}", style="italic"), soft_wrap=True)
        kept = [row for row in rows if not number or any(_cell(row.get(key)) for key in part if key not in names)]
        cells = [[_cell(row.get(key)) for key in part] for row in kept]
        made = table([escape(_lines(key)) for key in part], cells)
        for key, column in zip(part, made.columns, strict=True):
            column.no_wrap = column.no_wrap and _wide(rows, key) <= width - TEXT
            if all(isinstance(row.get(key), int | float | None) for row in kept):
                column.justify = "right"
        show(made)


def _parts(rows: Sequence[Row], names: list[str], figures: Sequence[str], width: int) -> Iterator[list[str]]:
    """Columns of tables that are at most so wide and all begin with the names."""
    most = dict.fromkeys(names[:1], width - TEXT)
    part, left = list(names), width + 2 - sum(2 + min(_wide(rows, key), most.get(key, TEXT)) for key in names)
    start = left
    for key in figures:
        room = 2 + min(_wide(rows, key), TEXT)
        if room > left and len(part) > len(names):
            yield part
            part, left = list(names), start
        part.append(key)
        left -= room
    if part:
        yield part


def _wide(rows: Sequence[Row], key: str) -> int:
    return max(map(cell_len, [*_lines(key).split("\n"), *(_cell(row.get(key)) for row in rows)]))


def _head(key: str, brief: bool) -> str:
    return HEADS[key][0] if brief and key in HEADS else key


def _lines(head: str) -> str:
    """A head over its column: `x plain` in two lines."""
    return head.replace("x ", "x\n", 1) if head.startswith("x ") else head


def _flat(row: Row, before: str = "") -> dict[str, Any]:
    """Numbers and texts of a row, those of objects within it as `object.key`; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif not isinstance(value, list):
            flat[f"{before}{key}"] = value
    return flat


def _cell(value: Any) -> str:
    """A value as text, figures rounded to three digits."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if 100 <= abs(rounded) < 1e6 else f"{rounded:#.3g}"
