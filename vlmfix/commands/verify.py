"""`vlmfix verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note, show, table
from vlmfix.commands.options import Json


def verify(
    bundle: Annotated[Path, typer.Argument(help="Zip that `vlmfix eval --bundle` wrote.")], as_json: Json = False
) -> None:
    """Score a bundle of answers again and compare everything that it states. Needs neither model nor pictures.

    Exit code: 0 everything agrees, 1 something does not, 2 wrong usage.
    """
    from vlmfix.eval.bundle import verify as check

    found = check(bundle)
    if as_json:
        emit({"ok": found.ok, **asdict(found)})
    else:
        shown = next((list(seeds[0])[:6] for seeds in found.figures.values() if seeds), [])
        rows = (
            [name, str(seed), *(f"{figures.get(metric, float('nan')):.1f}" for metric in shown)]
            for name, seeds in found.figures.items()
            for seed, figures in enumerate(seeds)
        )
        show(table(["row", "seed", *shown], rows, "scored again"))
        for problem in found.problems:
            note(problem, "bold red")
        counts = ", ".join(f"{count} {what}" for what, count in found.checked.items())
        note(f"{'everything agrees' if found.ok else f'{len(found.problems)} problems'}: {counts} compared", "bold")
    raise typer.Exit(ALL_ANSWERED if found.ok else SOME_FAILED)
