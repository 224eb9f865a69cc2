"""`vlmfix reproduce`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, show, table
from vlmfix.commands.grids import GridOptions, Telling
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError

if TYPE_CHECKING:
    from vlmfix.eval.grid import Grid
    from vlmfix.eval.reproduce import Reproduction


def reproduce(
    given: GridOptions,
    name: Annotated[str | None, typer.Argument(help="Published table; without one they are listed.")] = None,
    truth: Annotated[str | None, typer.Option(help="Annotations that a CHAIR table needs.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask items again that failed before.")] = False,
    as_json: Json = False,
) -> None:
    """Run a published table and judge every figure against the interval declared for it beforehand.

    Exit code: 0 every figure reproduced (or listed), 1 some outside or not comparable, 2 wrong usage.
    """
    from vlmfix.eval import reproduce as published

    if name is None:
        if as_json:
            emit({key: asdict(recipe) for key, recipe in published.RECIPES.items()})
        else:
            cells = ((key, one.model, one.title) for key, one in published.RECIPES.items())
            show(table(["name", "model", "table"], cells))
        return
    recipe = published.find(name)
    if given.option and any("=" not in pair for pair in given.option):
        raise UsageError("--option: write KEY=VALUE")
    options = dict(pair.split("=", 1) for pair in given.option or ())
    settings = {"truth": truth, "batch_size": given.batch_size, "protocol": given.protocol, **options}
    chosen = {key: value for key, value in settings.items() if value is not None}
    grid = published.grid(recipe, given.model, given.images or "", given.limit, load=given.loading(), **chosen)
    _run(name, recipe, grid, given, retry_errors, as_json)


def _run(name: str, recipe: Reproduction, grid: Grid, given: GridOptions, retry_errors: bool, as_json: bool) -> None:
    from vlmfix.eval import pipeline
    from vlmfix.eval import reproduce as published
    from vlmfix.eval.world import world

    arms = published.arms(recipe)
    opener = given.opener(grid, (arm.recipe for arm in arms))
    with Telling(quiet=world().rank > 0) as telling:
        result = pipeline.table(
            grid, recipe.benchmark, arms, opener, given.out / name, retry_errors=retry_errors, progress=telling
        )
    if result is None:
        return
    outcomes = published.judge(recipe, result.comparison)
    text = published.markdown(recipe, outcomes)
    (given.out / name / "verdict.md").write_text(text, encoding="utf-8")
    if as_json:
        emit([asdict(one) for one in outcomes])
    else:
        typer.echo(text)
    good = all(one.verdict == "reproduced" for one in outcomes)
    raise typer.Exit(ALL_ANSWERED if good else SOME_FAILED)
