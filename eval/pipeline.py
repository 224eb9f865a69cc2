"""One benchmark of a grid from beginning to end: what `vlmfix eval` calls for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import benchmarks, bundle, compare, suite
from . import table as tables
from .baselines import Arm
from .benchmarks import Benchmark
from .benchmarks.files import Problems
from .collect import Answered, collect, row
from .grid import Grid
from .importers import read_answers
from .judge import Bounds
from .world import world


@dataclass(frozen=True)
class Result:
    """A finished benchmark.

    Args:
        comparison: its table.
        rows: the answers behind it.
        files: what was written.
    """

    comparison: compare.Comparison
    rows: Sequence[Answered]
    files: Sequence[Path]


def table(
    grid: Grid,
    name: str,
    arms: Sequence[Arm],
    open: suite.Open,
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
        open: gives the answerer of an arm; see `answerer.Opener`.
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
    runs = suite.run(
        grid,
        benchmark,
        arms,
        open,
        place / "answers",
        pictures=pictures,
        retry_errors=retry_errors,
        progress=progress,
    )
    if world().rank:
        return None
    foreign = {label: read_answers(path, Problems()) for label, path in (add or {}).items()}
    rows = collect(grid, benchmark, arms, runs, foreign)
    made = [row(benchmark, each) for each in rows]
    comparison = compare.compare(benchmark.label, made, bounds=bounds)
    files = suite.write(comparison, place / name, grid.columns)
    if bundle_to:
        built = tables.build(comparison, list(grid.columns) or None)
        texts = {"table.md": tables.markdown(built), "table.json": tables.as_json(comparison)}
        files = [*files, bundle.write(bundle_to, name, options, rows, texts, load)]
    return Result(comparison, rows, files)
