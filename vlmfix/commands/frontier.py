"""`vlmfix frontier`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import emit, note, show, table
from vlmfix.commands.grids import GridOptions, Telling
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError, nearest

if TYPE_CHECKING:
    from vlmfix.eval.frontier import Matched


def frontier(
    target: Annotated[str, typer.Argument(help="chair or amber, scenes[:SPLIT], or a grid.toml with one of them.")],
    recipe: Annotated[str, typer.Argument(help="Recipe that holds the method, as in var or var+vcd.")],
    strength: Annotated[str, typer.Argument(help="Setting to sweep: alpha, or METHOD.alpha in a longer recipe.")],
    values: Annotated[str, typer.Argument(help="Its values, with commas between.")],
    given: GridOptions,
    as_json: Json = False,
) -> None:
    """Sweep a method's strength: hallucination against recall, with greedy answers cut short as the curve to beat.

    Mentioning less always lowers CHAIR. So every strength is compared with greedy captions cut to the same mean length.
    """
    from vlmfix.eval import drawn, pipeline
    from vlmfix.eval.baselines import methods_of
    from vlmfix.eval.frontier import sweep
    from vlmfix.eval.world import world

    methods = methods_of(recipe)
    method, _, name = strength.rpartition(".")
    if (method or len(methods) > 1) and method not in methods:
        raise UsageError(
            f"{strength!r}: write METHOD.{name} with one of {', '.join(methods)}{nearest(method, methods)}"
        )
    grid = given.grid("chair" if drawn.parse(target) else target, **_scenes(target, given))
    benchmark = next((each for each in grid.benchmarks if each in ("chair", "amber")), None)
    if benchmark is None:
        raise UsageError("a frontier needs captions: give chair or amber")
    method, numbers = method or methods[0], _numbers(values)
    opener = given.opener(grid, (arm.recipe for arm in sweep(recipe, method, name, numbers)))
    with Telling(quiet=world().rank > 0) as telling:
        found = pipeline.frontier(
            grid, benchmark, recipe, method, name, numbers, opener, given.out, progress=telling
        )  # fmt: skip
    if found is None:
        return
    if as_json:
        emit({**asdict(found), "figure": str(found.figure)})
        return
    cells = [
        (label, f"{x:.1f}", f"{y:.1f}", f"{found.matched[label].length:.1f}", *_gap(found.matched[label]))
        for x, y, label in found.curve
    ]
    cells += [(f"greedy, {label}", f"{x:.1f}", f"{y:.1f}", "", "") for x, y, label in found.reference]
    title = f"{recipe}: {strength} swept on {benchmark}"
    show(table(["row", "recall", "hallucinated", "words", "hallucinated, against greedy cut alike"], cells, title))
    note(f"figure: {found.figure}")


def _scenes(target: str, given: GridOptions) -> dict[str, Any]:
    from vlmfix.eval import drawn

    if drawn.parse(target) and given.images is None:
        object.__setattr__(given, "images", target)
    return {}


def _gap(matched: Matched) -> tuple[str]:
    gap = matched.differences.get("chair_i") or matched.differences["chair"]
    return (f"{gap.difference:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]",)


def _numbers(text: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r}: write numbers with commas between, as in 0.5,1,2") from None
