"""`vlmfix eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note, show, table
from vlmfix.commands.grids import GridOptions, Telling
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError

if TYPE_CHECKING:
    from vlmfix.eval.baselines import Arm
    from vlmfix.eval.grid import Grid
    from vlmfix.eval.pipeline import Result
    from vlmfix.eval.suite import Run


SHOWN = {
    "chair": ("chair_s", "chair_i", "recall", "f1"),
    "pope": ("f1", "accuracy", "random/f1", "popular/f1", "adversarial/f1", "auroc"),
}
"""Benchmark -> metrics printed where none are asked for; the files hold all."""


def evaluate(
    target: Annotated[str, typer.Argument(help="Benchmarks (pope,chair,amber,...), scenes[:SPLIT], or a grid.toml.")],
    given: GridOptions,
    methods: Annotated[
        str | None, typer.Option(help="Recipes with ';' between; 'all' for every method at its defaults.")
    ] = None,
    controls: Annotated[str | None, typer.Option(help="Further rows: trivial, placebo, or both with a comma.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds of sampled rows.")] = None,
    columns: Annotated[str | None, typer.Option(help="Metrics to print, with commas between.")] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Answers made elsewhere as a row; may be repeated.")
    ] = None,
    offset: Annotated[
        float | None, typer.Option(help="Yes/no threshold from the tuning split, for the trivial baseline.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Zip of answers, specs and versions that `vlmfix verify` scores again.")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask items again that failed before.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate time and memory per row; store nothing.")
    ] = False,
    answers_only: Annotated[
        bool, typer.Option("--answers-only", help="Answer, but make no table (score later with --stored).")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Make the table of the answers that --out holds; loads no model.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop answering after this time.")] = None,
    as_json: Json = False,
) -> None:
    """Answer benchmarks with several methods and compare them with greedy decoding.

    Tables hold, without asking, greedy, and beside contrastive methods sampling and sampling with their mask alone;
    recall, length, repetition, unparsed and empty answers, and cost. Differences are paired, with intervals over
    pictures. Started under torchrun or accelerate launch, every process answers its share. A run that was stopped goes
    on when the same command is given again, also with another number of processes.

    Exit code: 0 all answered, 1 some items or rows failed, 2 wrong usage.
    """
    from vlmfix.eval import grid as grids
    from vlmfix.eval.foreign import parse_add

    if sum((dry_run, answers_only, stored)) > 1:
        raise UsageError("--dry-run, --answers-only and --stored exclude each other")
    grid = given.grid(
        target,
        methods=grids.parse({"benchmarks": ["text"], "methods": methods}).methods if methods else None,
        controls=_words(controls),
        seeds=None if seeds is None else tuple(range(seeds)),
        columns=_words(columns),
    )
    foreign = dict(parse_add(text) for text in add or ())
    rows = {name: _arms(grid, name, offset) for name in grid.benchmarks}
    if dry_run:
        failed = _estimate(grid, rows, given, as_json)
    elif answers_only:
        failed = _answer(grid, rows, given, retry_errors, seconds)
    else:
        failed = _tables(grid, rows, given, stored, as_json, seconds, foreign, bundle, retry_errors)
    raise typer.Exit(SOME_FAILED if failed else ALL_ANSWERED)


def _arms(grid: Grid, name: str, offset: float | None = None) -> list[Arm]:
    from vlmfix.eval import benchmarks, suite
    from vlmfix.eval import grid as grids

    captions = benchmarks.load(name, **grid.benchmarks[name]).max_new_tokens > suite.SHORT
    return grids.arms(grid, captions, grids.contrastive(), offset)


def _recipes(rows: dict[str, list[Arm]]) -> list[str]:
    """Recipes of all rows; those that were asked for first, so that an error quotes them."""
    arms = [arm for each in rows.values() for arm in each if not arm.derive]
    return [arm.recipe for arm in sorted(arms, key=lambda arm: arm.kind != "method")]


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _tables(
    grid: Grid,
    rows: dict[str, list[Arm]],
    given: GridOptions,
    stored: bool,
    as_json: bool,
    seconds: float | None,
    foreign: dict[str, Path],
    bundle: Path | None,
    retry_errors: bool,
) -> bool:
    from vlmfix.eval import pipeline
    from vlmfix.eval import table as tables
    from vlmfix.eval.world import world

    opener = None if stored else given.opener(grid, _recipes(rows))
    results: dict[str, Result] = {}
    with Telling(seconds, quiet=world().rank > 0) as telling:
        for name, arms in rows.items():
            place = bundle if bundle is None or len(rows) == 1 else bundle.with_stem(f"{bundle.stem}-{name}")
            result = pipeline.table(
                grid, name, arms, opener, given.out,
                add=foreign, bundle_to=place, retry_errors=retry_errors, progress=telling,
            )  # fmt: skip
            if result is not None:
                results[name] = result
    for name, result in results.items():
        if not as_json:
            for half in tables.halves(tables.build(result.comparison, _columns(grid, name, result))):
                show(tables.rich_table(half))
        note(f"{name}: {', '.join(map(str, result.files))}")
    if as_json and results:
        emit({name: json.loads(tables.as_json(result.comparison)) for name, result in results.items()})
    return any(_failed(result) for result in results.values())


def _columns(grid: Grid, benchmark: str, result: Result) -> list[str] | None:
    """The asked columns that this benchmark has, or those of `SHOWN`."""
    wanted = grid.columns or SHOWN.get(benchmark, ())
    return [name for name in wanted if name in result.comparison.metrics] or None


def _failed(result: Result) -> bool:
    lost = [name for name in result.missing if "[placebo: " not in name]  # a placebo may have nothing to exchange
    return bool(lost) or any(
        len(answers) < len(row.asked) for row in result.rows for answers in row.answers if row.kind != "foreign"
    )


def _answer(
    grid: Grid, rows: dict[str, list[Arm]], given: GridOptions, retry_errors: bool, seconds: float | None
) -> bool:
    from vlmfix.eval import pipeline
    from vlmfix.eval.world import world

    opener, failed = given.opener(grid, _recipes(rows)), 0
    with Telling(seconds, quiet=world().rank > 0) as telling:
        for name, arms in rows.items():
            runs, refused = pipeline.answer(
                grid, name, arms, opener, given.out, retry_errors=retry_errors, progress=telling
            )
            failed += sum(run.outcome.failed for run in runs if run.outcome)
            for row, reason in refused.items():
                note(f"{name}, {row}: {reason}", "bold")
    note(f"answers in {given.out / 'answers'}, {failed} failed", "bold")
    return failed > 0


def _estimate(grid: Grid, rows: dict[str, list[Arm]], given: GridOptions, as_json: bool) -> bool:
    from vlmfix.eval import benchmarks, suite

    opener, refused = given.opener(grid, _recipes(rows)), dict[str, str]()
    found: list[tuple[str, Run]] = []
    for name, arms in rows.items():
        made = benchmarks.load(name, **grid.benchmarks[name])
        where = given.out / "answers"
        found += [(name, run) for run in suite.run(grid, made, arms, opener, where, dry=True, refused=refused)]
    lines = [_estimated(name, run) for name, run in found]
    if as_json:
        emit({"rows": lines, "refused": refused})
    else:
        heads = ["benchmark", "row", "seed", "items left", "s/item", "hours", "peak MiB"]
        show(table(heads, map(_cells, lines), "estimate from a few warmed batches"))
        note(f"{sum(line['hours'] for line in lines):.2f} hours in all", "bold")
        for row, reason in refused.items():
            note(f"{row}: {reason}", "bold")
    return bool(refused)


def _estimated(name: str, run: Run) -> dict[str, Any]:
    assert run.estimate is not None
    one = run.estimate
    return {
        "benchmark": name, "row": run.arm.name, "seed": run.seed, "items": one.items,
        "seconds_per_item": one.seconds_per_item, "hours": one.hours, "peak_mib": one.peak_mib,
    }  # fmt: skip


def _cells(line: dict[str, Any]) -> Sequence[str]:
    peak, seed = line["peak_mib"], line["seed"]
    ends = ("" if seed is None else str(seed), str(line["items"]), f"{line['seconds_per_item']:.3f}")
    return line["benchmark"], line["row"], *ends, f"{line['hours']:.3f}", "" if peak is None else f"{peak:.0f}"
