"""One benchmark of a grid from beginning to end: what `vlmfix eval` calls for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import benchmarks, bundle, compare, figures, stored, suite
from . import table as tables
from .baselines import GREEDY, Arm
from .benchmarks import Benchmark
from .benchmarks.files import Problems
from .collect import Answered, collect, row
from .frontier import Matched, Point, matched, point, reference_curve, sweep
from .grid import Grid
from .importers import read_answers
from .judge import Bounds
from .world import world


@dataclass(frozen=True)
class Frontier:
    """A strength swept.

    Args:
        curve: recall, hallucination and strength of each point.
        reference: the same of truncated greedy answers.
        matched: strength -> comparison with greedy cut to the same mean length.
        figure: the SVG file.
    """

    curve: Sequence[Point]
    reference: Sequence[Point]
    matched: Mapping[str, Matched]
    figure: Path


@dataclass(frozen=True)
class Result:
    """A finished benchmark.

    Args:
        comparison: its table.
        rows: the answers behind it.
        files: what was written.
        missing: row -> why it is not in the table.
    """

    comparison: compare.Comparison
    rows: Sequence[Answered]
    files: Sequence[Path]
    missing: Mapping[str, str] = field(default_factory=dict)


ORDER = {"reference": 0, "method": 1, "control": 2, "baseline": 3}
"""Kinds of rows in the order in which they are answered; others come last."""
KEPT = 0.9
"""Share of items that a row must answer to stand in the table, since rows are compared on the items of all."""


def answer(
    grid: Grid,
    name: str,
    arms: Sequence[Arm],
    open: suite.Open,
    out: str | Path,
    *,
    pictures: Callable[[str], Any] | None = None,
    retry_errors: bool = False,
    progress: suite.Progress | None = None,
    load: Callable[..., Benchmark] = benchmarks.load,
) -> tuple[list[suite.Run], dict[str, str]]:
    """Answers one benchmark, this process's share; arguments as in `table`.

    Returns:
        The runs, and per row that cannot act on the model the reason.
    """
    refused: dict[str, str] = {}
    benchmark = load(name, **grid.benchmarks[name])
    runs = suite.run(
        grid,
        benchmark,
        sorted(arms, key=lambda arm: ORDER.get(arm.kind, len(ORDER))),
        open,
        Path(out) / "answers",
        pictures=pictures,
        retry_errors=retry_errors,
        progress=progress,
        refused=refused,
    )
    if not world().rank:
        stored.note_refused(Path(out) / "answers", benchmark.label, refused)
    return runs, refused


def table(
    grid: Grid,
    name: str,
    arms: Sequence[Arm],
    open: suite.Open | None,
    out: str | Path,
    *,
    add: Mapping[str, str | Path] | None = None,
    bundle_to: str | Path | None = None,
    pictures: Callable[[str], Any] | None = None,
    retry_errors: bool = False,
    progress: suite.Progress | None = None,
    bounds: Bounds | None = None,
    load: Callable[..., Benchmark] = benchmarks.load,
) -> Result | None:
    """Answers, scores, compares and writes one benchmark; every process answers its share, the first one does the rest.

    Args:
        grid: the grid.
        name: one of its benchmarks.
        arms: the rows, greedy first; see `grid.arms`.
        open: gives the answerer of an arm; see `answerer.Opener`. None to answer nothing and read what `out` holds.
        out: folder; answers lie in `answers/`, the table in a folder called after the benchmark.
        add: row name -> file of foreign answers.
        bundle_to: zip file to write.
        pictures: as in `suite.run`.
        retry_errors: whether failed items are asked again.
        progress: told after every batch.
        bounds: of the warnings.
        load: makes the benchmark.

    Returns:
        The result in the first process, None in the others.
    """
    options = grid.benchmarks[name]
    benchmark, place = load(name, **options), Path(out)
    if open is None:
        runs, missing = stored.runs(grid, benchmark, arms, place / "answers")
    else:
        runs, missing = answer(
            grid,
            name,
            arms,
            open,
            out,
            pictures=pictures,
            retry_errors=retry_errors,
            progress=progress,
            load=load,
        )
    if world().rank:
        return None
    foreign = {label: read_answers(path, Problems()) for label, path in (add or {}).items()}
    rows = collect(grid, benchmark, [arm for arm in arms if arm.name not in missing], runs, foreign)
    rows = [each for each in rows if each.kind == "reference" or not _failed(each, missing)]
    if not rows[0].answers[0]:
        raise UsageError(f"greedy answered nothing: {'; '.join(rows[0].notes)}")
    made = [row(benchmark, each) for each in rows]
    known = made[0].score.metrics
    columns = grid.columns if len(grid.benchmarks) == 1 else [name for name in grid.columns if name in known]
    comparison = compare.compare(benchmark.label, made, bounds=bounds, tested=columns or None)
    if len(grid.benchmarks) > 1:
        columns = [column for column in columns if column in comparison.metrics]
    if len(grid.benchmarks) > 1:  # guards have columns of their own
        columns = [name for name in columns if name in comparison.metrics]
    absent = [f"not in the table, {label}: {reason}" for label, reason in missing.items()]
    comparison = replace(comparison, notes=[*comparison.notes, *absent])
    files = suite.write(comparison, place / name, columns)
    if bundle_to:
        built = tables.build(comparison, list(columns) or None)
        texts = {"table.md": tables.markdown(built), "table.json": tables.as_json(comparison)}
        files = [*files, bundle.write(bundle_to, name, options, rows, texts, load)]
    return Result(comparison, rows, files, missing)


def _failed(answered: Answered, missing: dict[str, str]) -> bool:
    """Whether a row has too few answers to be compared; the reason is noted."""
    least = min(map(len, answered.answers), default=0)
    if least >= KEPT * len(answered.asked):
        return False
    missing[answered.name] = f"{least} of {len(answered.asked)} items answered; {'; '.join(answered.notes)}"
    return True


def frontier(
    grid: Grid,
    name: str,
    recipe: str,
    method: str,
    strength: str,
    values: Sequence[Any],
    open: suite.Open,
    out: str | Path,
    *,
    pictures: Callable[[str], Any] | None = None,
    progress: suite.Progress | None = None,
    load: Callable[..., Benchmark] = benchmarks.load,
) -> Frontier | None:
    """Hallucination against recall while a method's strength is swept, with truncated greedy as the curve to beat.

    Args:
        grid: the grid; its methods do not count.
        name: a caption benchmark of it.
        recipe: holds the method.
        method: name of the method.
        strength: its hyper-parameter.
        values: of the strength.
        open: as in `table`.
        out: folder; the figure is `NAME/frontier.svg` in it.
        pictures: as in `table`.
        progress: as in `table`.
        load: as in `table`.

    Returns:
        The frontier in the first process, None in the others.
    """
    benchmark, place = load(name, **grid.benchmarks[name]), Path(out)
    arms = [GREEDY, *sweep(recipe, method, strength, values)]
    runs = suite.run(grid, benchmark, arms, open, place / "answers", pictures=pictures, progress=progress)
    if world().rank:
        return None
    greedy, *rest = collect(grid, benchmark, arms, runs)
    known = benchmark.score(greedy.answers[0]).metrics
    x, y = "recall" if "recall" in known else "cover", "chair_i" if "chair_i" in known else "chair"
    curve = [point(benchmark.score(each.answers[0]), each.name, x, y) for each in rest]
    reference = reference_curve(greedy.answers[0], benchmark.score, x=x, y=y)
    compared = {each.name: matched(greedy.asked, greedy.answers[0], each.answers[0], benchmark.score) for each in rest}
    figure = place / name / "frontier.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    figure.write_text(figures.frontier({recipe: curve}, reference, x, y), encoding="utf-8")
    return Frontier(curve, reference, compared, figure)
