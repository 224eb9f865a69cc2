"""Runs of one benchmark side by side: paired differences to the reference row, Holm over the table, warnings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from ..errors import UsageError
from . import guards, stats
from .base import Item, Score
from .guards import Record
from .judge import Bounds, direction, warnings

SHARES = ("unparsed", "yes_ratio")
DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One method's run.

    Args:
        name: what the table calls it.
        score: benchmark, text and cost columns on the scored items; averaged over seeds if there are several.
        kind: `reference`, `control`, `baseline`, `placebo`, `method` or `foreign`.
        grade: evidence grade of the method; empty if it has none.
        peak_mib: highest memory over the weights, if known.
        seeds: the single seeds' scores, if there are several.
        notes: what a reader must know of this row.
    """

    name: str
    score: Score
    kind: str = "method"
    grade: str = ""
    peak_mib: float | None = None
    seeds: Sequence[Score] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """A figure of a row.

    Args:
        value: the figure.
        difference: to the reference; None in the reference's row and for figures that are no sums.
        p: Holm-adjusted over the table; None if not tested.
        verdict: `better` or `worse` if both significant after Holm and not below the smallest detectable difference.
    """

    value: float
    difference: stats.Difference | None = None
    p: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the finished comparison: its cells by metric, and its warnings."""

    name: str
    kind: str
    grade: str
    cells: Mapping[str, Cell]
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """A finished table.

    Args:
        title: benchmark and scorer variant.
        metrics: the benchmark's metrics, headline first.
        guards: the other columns, in order.
        lines: reference first.
        items: number of items in every row.
        pictures: number of pictures.
        tests: number of p values that Holm's correction saw.
        level: coverage of the intervals.
        notes: what holds for the whole table.
    """

    title: str
    metrics: Sequence[str]
    guards: Sequence[str]
    lines: Sequence[Line]
    items: int
    pictures: int
    tests: int
    level: float
    notes: Sequence[str] = field(default_factory=tuple)


def row(
    name: str,
    items: Sequence[Item],
    runs: Sequence[Mapping[str, Record]],
    scores: Sequence[Score],
    kind: str = "method",
    grade: str = "",
    notes: Sequence[str] = (),
) -> Row:
    """The row of one recipe: the benchmark's score of each seed joined with text quality and cost.

    Args:
        name: what the table calls it.
        items: the benchmark's items.
        runs: per seed, item id -> record.
        scores: per seed, what the benchmark's scorer returned.
        kind: see `Row`.
        grade: evidence grade.
        notes: see `Row`.
    """
    joined = []
    for records, score in zip(runs, scores, strict=True):
        known = [i for i in score.ids if i in records]
        extra = [guards.text_score(items, records), guards.cost_score(items, records)]
        joined.append(guards.join(guards.restrict(score, known), *(guards.restrict(x, known) for x in extra)))
    peaks = [peak for records in runs if (peak := guards.peak_mib(records)) is not None]
    seeds = joined if len(joined) > 1 else []
    return Row(name, stats.pool(joined), kind, grade, max(peaks, default=None), seeds, notes)


def compare(
    title: str,
    rows: Sequence[Row],
    *,
    bounds: Bounds | None = None,
    tested: Collection[str] | None = None,
    level: float = 0.95,
    draws: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares rows with the first one, the reference, on the items that every row answers.

    Holm's correction runs over every difference whose direction is known (better or worse), of all rows together.

    Args:
        title: benchmark and scorer variant.
        rows: reference first.
        bounds: of the guards.
        tested: metrics that are tested, those that a table prints; all by default.
        level: coverage of the intervals; tests have size 1 - level.
        draws: of the resamplings; by default `DRAWS`, or more where the smallest p value that they can give would not
            outlive Holm's correction.
        seed: of the resamplings.

    Raises:
        UsageError: without rows, with two rows of one name, or if no item is answered by all.
    """
    if not rows:
        raise UsageError("a table needs at least one row")
    names = [entry.name for entry in rows]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two rows are called {name!r}; give each its own name")
    rows, notes = _common(rows)
    reference = rows[0]
    family = [name for name in reference.score.metrics if direction(name) and (tested is None or name in tested)]
    draws = draws or max(DRAWS, ceil(4 * len(family) * len(rows) / (1 - level)))
    gaps = [stats.paired(reference.score, r.score, level=level, draws=draws, seed=seed) for r in rows[1:]]
    metrics = [name for name in reference.score.metrics if name not in (*guards.TEXT, *guards.COST, *SHARES)]
    asked = [(place, name) for place, gap in enumerate(gaps) for name in family if name in gap]
    adjusted = dict(zip(asked, stats.holm([gaps[place][name].p for place, name in asked]), strict=True))
    lines = []
    for place, entry in enumerate(rows, -1):
        figures, moved, cells = entry.score.figures(), gaps[place] if place >= 0 else {}, {}
        for name, value in figures.items():
            if name in guards.COST and value != value:
                continue  # not recorded
            found = moved.get(name)
            p = adjusted.get((place, name)) if found else None
            cells[name] = Cell(value, found, p, _verdict(name, found, p, 1 - level))
        if entry.peak_mib is not None:
            cells["peak_mib"] = Cell(entry.peak_mib)
        told = warnings(figures, moved, metrics, bounds or Bounds())
        lines.append(Line(entry.name, entry.kind, entry.grade, cells, told, [*entry.notes, *_seeds(entry, metrics)]))
    shown = [name for name in (*SHARES, *guards.TEXT, *guards.COST) if any(name in line.cells for line in lines)]
    count = len([p for p in adjusted.values() if p == p])
    score = reference.score
    return Comparison(title, metrics, shown, lines, len(score.ids), len(set(score.clusters)), count, level, notes)


def _common(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Every row restricted to the items that all rows answer, and a note naming the rest."""
    shared = set(rows[0].score.ids).intersection(*(set(r.score.ids) for r in rows))
    if not shared:
        raise UsageError(
            f"no item is answered by all of {', '.join(r.name for r in rows)}; compare runs of one benchmark"
        )
    order = [name for name in rows[0].score.ids if name in shared]
    dropped = sorted({name for r in rows for name in r.score.ids} - shared)
    notes = (
        [f"{len(dropped)} items without an answer in some row are left out of every row: {_some(dropped)}"]
        if dropped
        else []
    )
    cut = [
        Row(r.name, guards.restrict(r.score, order), r.kind, r.grade, r.peak_mib,
            [guards.restrict(s, order) for s in r.seeds], r.notes)
        for r in rows
    ]  # fmt: skip
    return cut, notes


def _verdict(name: str, gap: stats.Difference | None, p: float | None, size: float) -> str:
    if gap is None or p is None or not p < size or not abs(gap.difference) >= gap.detectable:
        return ""
    return "better" if gap.difference * direction(name) > 0 else "worse"


def _seeds(entry: Row, metrics: Sequence[str]) -> list[str]:
    if not entry.seeds or not metrics:
        return []
    found = stats.spread(entry.seeds, draws=2000)[metrics[0]]
    return [f"{found.seeds} seeds: {metrics[0]} sd over seeds {found.seed_sd:.2f}, over pictures {found.item_sd:.2f}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
