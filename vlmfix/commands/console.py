"""What commands print: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

WIDE = 160
"""Columns when stdout is no terminal and COLUMNS is not set."""

ALL_ANSWERED, SOME_FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""


def screen(stderr: bool = False) -> Console:
    """A console for this call's stdout or stderr."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal or "COLUMNS" in os.environ else WIDE
    return Console(stderr=stderr, highlight=False, width=width)


def show(what: RenderableType) -> None:
    """Prints a table or text on stdout."""
    screen().print(what)


def emit(data: Any, *, indent: int | None = 1) -> None:
    """Prints JSON on stdout."""
    typer.echo(json.dumps(data, indent=indent, ensure_ascii=False, default=str))


def note(text: str, style: str = "dim") -> None:
    """Prints a line on stderr."""
    screen(stderr=True).print(f"[{style}]{escape(text)}[/]", soft_wrap=True)


def fail(error: Exception, code: int = WRONG_USAGE) -> int:
    """Prints an error on stderr and returns the exit code."""
    screen(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
    return code


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; cells are taken literally, those of the first column never broken."""
    made = Table(title=title, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, no_wrap=index == 0, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made
