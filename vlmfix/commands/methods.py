"""`vlmfix methods`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vlmfix.commands.console import emit, show, table
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError, nearest
from vlmfix.registry import ROWS, Row


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the settings of this method only.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods that recipes are made of, or show the settings of one."""
    rows = [row for row in ROWS if name in (None, row.name)]
    if not rows:
        raise UsageError(f"unknown method {name!r}{nearest(str(name), [row.name for row in ROWS])}")
    if as_json:
        emit([asdict(row) for row in rows])
    elif name is None:
        show(table(["method", "kind", "what it does", "cost", "evidence", "arXiv"], map(cells, rows)))
    else:
        typer.echo(details(rows[0]))


def cells(row: Row) -> tuple[str, ...]:
    """A method's line in tables."""
    return row.name, row.kind, row.summary, row.cost, row.evidence, row.paper


def details(row: Row) -> str:
    """All that is known of a method without loading it."""
    lines = [f"{row.name}: {row.summary}", f"  {row.title}" + (f" (arXiv:{row.paper})" if row.paper else "")]
    lines += [
        f"  kind {row.kind}, cost: {row.cost}, evidence: {row.evidence}",
        f"  works with: {', '.join(row.capabilities)}",
    ]
    lines += [f"  {key} = {value!r}" for key, value in row.defaults.items()]
    return "\n".join(lines)
