"""`vlmfix models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vlmfix.commands.console import emit, note, screen, show, table
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError, nearest
from vlmfix.hf.families import FAMILIES, Family

COLUMNS = (
    *("family", "decoder", "visual tokens per picture", "mask", "branches", "captured step", "without torchvision"),
    "status",
)
NARROW = ("family", "branches", "captured step", "status")
"""The columns where there is no room for all."""

ROOM = 155
"""Characters of a line that all columns take without broken words."""


def models(
    name: Annotated[str | None, typer.Argument(help="Show all that is known of this family only.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="List untested families too.")] = False,
    as_json: Json = False,
) -> None:
    """List the families of models: tested, refused and why, and with --all the untested."""
    if name is not None and name not in FAMILIES:
        raise UsageError(f"unknown family {name!r}{nearest(name, FAMILIES)}")
    rows = [row for row in FAMILIES.values() if name in (None, row.name)]
    listed = [row for row in rows if everything or name or row.status != "untested"]
    if as_json:
        emit([asdict(row) for row in listed])
    elif name is None:
        shown = COLUMNS if screen().width >= ROOM else NARROW
        lines = (dict(zip(COLUMNS, cells(row), strict=True)) for row in listed)
        show(table(shown, ([line[column] for column in shown] for line in lines)))
        if left := [column for column in COLUMNS if column not in shown]:
            note(
                f"not shown for want of {ROOM} columns: {', '.join(left)}; `vlmfix models FAMILY` and --json have them"
            )
        if len(listed) < len(rows):
            note(f"{len(rows) - len(listed)} further families are untested: --all lists them")
    else:
        typer.echo("\n".join(f"{key}: {value}" for key, value in asdict(rows[0]).items()))


def cells(row: Family) -> tuple[str, ...]:
    """A family's line in tables."""
    return row.name, row.decoder, row.tokens, row.mask, row.branches, row.replayed, row.processor, row.status
