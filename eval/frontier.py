"""Strength swept: hallucination against recall, with truncated greedy answers as the curve to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from . import stats
from .base import Item, Score
from .baselines import Arm, derived, with_value
from .guards import Record, text_score

Scorer = Callable[[Sequence[Record]], Score]
Point = tuple[float, float, str]
LIMITS = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 130)
"""Word limits of the reference curve."""


@dataclass(frozen=True)
class Matched:
    """A method against greedy answers cut to the same mean length.

    Args:
        limit: word limit of the cut.
        length: mean words of the method's answers.
        cut_length: mean words of the cut answers.
        differences: method minus cut greedy, by metric.
    """

    limit: int
    length: float
    cut_length: float
    differences: Mapping[str, stats.Difference]


def sweep(recipe: str, method: str, strength: str, values: Sequence[Any]) -> list[Arm]:
    """One arm for each strength of one method of a recipe."""
    return [Arm(f"{strength}={value:g}", "method", with_value(recipe, method, strength, value)) for value in values]


def truncated(records: Sequence[Record], limit: int) -> list[dict[str, Any]]:
    """Answers cut after a number of words."""
    return derived(Arm("cut", "baseline", derive=("words", limit)), records)


def point(score: Score, label: str, x: str = "recall", y: str = "chair_i") -> Point:
    """Recall, hallucination and label of a run.

    Raises:
        UsageError: if the benchmark lacks one of the metrics.
    """
    figures = score.figures()
    for name in (x, y):
        if name not in figures:
            raise UsageError(f"a frontier needs the metric {name!r}; this benchmark has {', '.join(figures)}")
    return figures[x], figures[y], label


def reference_curve(
    records: Sequence[Record], score: Scorer, limits: Sequence[int] = LIMITS, x: str = "recall", y: str = "chair_i"
) -> list[Point]:
    """Points of greedy answers cut after more and more words; the last one is uncut.

    Args:
        records: the reference's records.
        score: the benchmark's scorer.
        limits: word limits.
        x: metric of the horizontal axis.
        y: metric of the vertical axis.
    """
    longest = max((len(record["text"].split()) for record in records if "text" in record), default=0)
    kept = [limit for limit in limits if limit < longest]
    points = [point(score(truncated(records, limit)), f"{limit} words", x, y) for limit in kept]
    return [*points, point(score(records), "uncut", x, y)]


def matched(
    items: Sequence[Item], reference: Sequence[Record], records: Sequence[Record], score: Scorer, draws: int = 10_000
) -> Matched:
    """Compares a method with the reference cut so that the mean lengths agree.

    The word limit is the one whose mean length is nearest to the method's; a method longer than the reference meets the
    uncut answers.

    Args:
        items: the benchmark's items.
        reference: the reference's records.
        records: the method's records on the same items.
        score: the benchmark's scorer.
        draws: of the resamplings.
    """
    goal = _words(items, records)
    lengths = [len(record["text"].split()) for record in reference if "text" in record]
    low, high = 0, max(lengths, default=0)
    while low < high:  # the mean length grows with the limit
        middle = (low + high) // 2
        if _words(items, truncated(reference, middle)) < goal:
            low = middle + 1
        else:
            high = middle
    limit = min((k for k in (low - 1, low) if k >= 0), key=lambda k: abs(_words(items, truncated(reference, k)) - goal))
    cut = truncated(reference, limit)
    differences = stats.paired(score(cut), score(records), draws=draws)
    return Matched(limit, goal, _words(items, cut), differences)


def _words(items: Sequence[Item], records: Sequence[Record]) -> float:
    answered = {str(record["id"]): record for record in records if "text" in record}
    return text_score(items, answered).figures()["length"]
