"""`vlmfix models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vlmfix.commands.console import emit, note, show, table
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError, nearest
from vlmfix.hf.families import FAMILIES, Family

COLUMNS = (
    *("family", "decoder", "visual tokens per picture", "mask", "branches", "captured step", "without torchvision"),
    "status",
)


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
        show(table(COLUMNS, map(cells, listed)))
        if len(listed) < len(rows):
            note(f"{len(rows) - len(listed)} further families are untested: --all lists them")
    else:
        typer.echo("\n".join(f"{key}: {value}" for key, value in asdict(rows[0]).items()))


def cells(row: Family) -> tuple[str, ...]:
    """A family's line in tables."""
    return row.name, row.decoder, row.tokens, row.mask, row.branches, row.replayed, row.processor, row.status
