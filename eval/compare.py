"""Runs of one benchmark side by side: paired differences to the reference row, Holm over the table, warnings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from ..errors import UsageError
from . import guards, stats
from .base import Item, Score
from .guards import Record

HIGHER = frozenset(
    [
        "accuracy",
        "acc",
        "acc_plus",
        "aacc",
        "qacc",
        "facc",
        "precision",
        "recall",
        "f1",
        "auroc",
        "cover",
        "amber",
        "score",
        "rating",
    ]
)
LOWER = frozenset(
    ["chair", "chair_s", "chair_i", "chairs", "chairi", "hal", "cog", "hallucination_rate", "hallucination"]
)
SHARES = ("unparsed", "yes_ratio")
LOOPING = 10.0
"""Mean share of repeated 4-grams, in %, from which answers count as loops whatever the reference does."""


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
class Bounds:
    """How far a guard may move before a gain counts as bought; points, `length` in % of the reference.

    Args:
        recall: largest fall of recall or cover.
        length: largest fall of the mean length, looked at where the reference has at least `words` words.
        words: see `length`.
        rep_4: largest rise of repeated 4-grams.
        distinct_4: largest fall of distinct 4-grams.
        empty: largest rise of the share of empty answers.
        unparsed: largest rise of the share of answers that could not be parsed.
        yes_ratio: largest move of the yes ratio, either way.
    """

    recall: float = 2.0
    length: float = 20.0
    words: float = 8.0
    rep_4: float = 2.0
    distinct_4: float = 2.0
    empty: float = 1.0
    unparsed: float = 1.0
    yes_ratio: float = 5.0


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
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares rows with the first one, the reference, on the items that every row answers.

    Holm's correction runs over every difference whose direction is known (better or worse), of all rows together.

    Args:
        title: benchmark and scorer variant.
        rows: reference first.
        bounds: of the guards.
        level: coverage of the intervals; tests have size 1 - level.
        draws: of the resamplings.
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
    gaps = [stats.paired(reference.score, r.score, level=level, draws=draws, seed=seed) for r in rows[1:]]
    metrics = [name for name in reference.score.metrics if name not in (*guards.TEXT, *guards.COST, *SHARES)]
    tested = [(place, name) for place, gap in enumerate(gaps) for name in gap if direction(name)]
    adjusted = dict(zip(tested, stats.holm([gaps[place][name].p for place, name in tested]), strict=True))
    lines = []
    for place, entry in enumerate(rows, -1):
        figures, cells = entry.score.figures(), {}
        for name, value in figures.items():
            if name in guards.COST and value != value:
                continue  # not recorded
            found = gaps[place].get(name) if place >= 0 else None
            p = adjusted.get((place, name)) if found else None
            cells[name] = Cell(value, found, p, _verdict(name, found, p, 1 - level))
        if entry.peak_mib is not None:
            cells["peak_mib"] = Cell(entry.peak_mib)
        warnings = _warnings(cells, metrics, bounds or Bounds())
        lines.append(
            Line(entry.name, entry.kind, entry.grade, cells, warnings, [*entry.notes, *_seeds(entry, metrics)])
        )
    shown = [name for name in (*SHARES, *guards.TEXT, *guards.COST) if any(name in line.cells for line in lines)]
    count = len([p for p in adjusted.values() if p == p])
    score = reference.score
    return Comparison(title, metrics, shown, lines, len(score.ids), len(set(score.clusters)), count, level, notes)


def direction(metric: str) -> int:
    """1 if more is better, -1 if less is, 0 if unknown; a name's last known word decides (`random accuracy`)."""
    words = re.split(r"[\s/:.]+", re.sub(r"[-\[(]", "_", metric.lower()).replace("+", "_plus"))
    for word in reversed(words):
        word = word.strip("_)]")
        if word in HIGHER or word in LOWER:
            return 1 if word in HIGHER else -1
    return 0


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


def _warnings(cells: Mapping[str, Cell], metrics: Sequence[str], bounds: Bounds) -> list[str]:
    """Guards beyond their bounds in a row with a gain; loops always."""
    moved = {name: cell.difference for name, cell in cells.items() if cell.difference is not None}
    gains = [
        f"{name} {gap.difference:+.1f}"
        for name in metrics
        if (gap := moved.get(name)) and direction(name) and _gain(gap, direction(name))
    ]
    flaws = []
    for name in metrics:
        if re.search(r"recall|cover", name.lower()) and name in moved and moved[name].difference < -bounds.recall:
            flaws.append(f"{name} {moved[name].difference:+.1f} (bound -{bounds.recall:g})")
    if "length" in moved and moved["length"].reference >= bounds.words:
        change = 100 * moved["length"].difference / moved["length"].reference
        if change < -bounds.length:
            flaws.append(f"length {change:+.0f} % (bound -{bounds.length:g} %)")
    for name, sign in (("rep_4", 1), ("distinct_4", -1), ("empty", 1), ("unparsed", 1), ("yes_ratio", 0)):
        if name in moved:
            change, bound = moved[name].difference, getattr(bounds, name)
            if (sign * change if sign else abs(change)) > bound:
                flaws.append(f"{name} {change:+.1f} (bound {'±' if not sign else '+' if sign > 0 else '-'}{bound:g})")
    found = [f"gain ({', '.join(gains)}) comes with {', '.join(flaws)}"] if gains and flaws else []
    if "rep_4" in cells and cells["rep_4"].value >= LOOPING:
        found.append(f"answers loop: {cells['rep_4'].value:.1f} % of 4-grams are repeats")
    return found


def _gain(gap: stats.Difference, sign: int) -> bool:
    ends = [end * sign for end in (gap.low, gap.high)]
    return gap.difference * sign > 0 and (min(ends) > 0 if isfinite(sum(ends)) else True)


def _seeds(entry: Row, metrics: Sequence[str]) -> list[str]:
    if not entry.seeds or not metrics:
        return []
    found = stats.spread(entry.seeds, draws=2000)[metrics[0]]
    return [f"{found.seeds} seeds: {metrics[0]} sd over seeds {found.seed_sd:.2f}, over pictures {found.item_sd:.2f}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
