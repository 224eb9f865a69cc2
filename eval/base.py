"""Words shared by every benchmark: items, answers, scores as sums of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Mapping[str, Any]], Any]
"""Column sums -> figure. Must work on floats and, element by element, on arrays (bootstrap replicates)."""


@dataclass(frozen=True)
class Item:
    """One question about one picture.

    Args:
        id: unique within the benchmark.
        image: file name or key of the picture; the cluster of all paired statistics.
        prompt: the text asked.
        truth: what the scorer needs (label, category, annotated objects).
    """

    id: str
    image: str
    prompt: str
    truth: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a scorer returns: per-item columns, and metrics that are functions of the columns' sums.

    Every figure of a table, its bootstrap interval and every paired difference come from the same sums, so a scorer
    never has to know about statistics.

    Args:
        ids: item ids, in the order of the rows of `values`.
        clusters: picture of each item.
        columns: names of the columns of `values`.
        values: [items, columns] float64.
        metrics: name -> function of column sums; the first is the headline.
        problems: every item that was not scored as usual, named: duplicates, missing pictures, empty or unparsed
            answers.
        details: per-item extras for reports (character spans of counted objects, parsed answer).
    """

    ids: Sequence[str]
    clusters: Sequence[str]
    columns: Sequence[str]
    values: Floats
    metrics: Mapping[str, Metric]
    problems: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Every metric over all items; nan where undefined."""
        sums = dict(zip(self.columns, self.values.sum(0), strict=True))
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: float(metric(sums)) for name, metric in self.metrics.items()}


def ratio(numerator: str, denominator: str, percent: bool = True) -> Metric:
    """The metric sum(numerator) / sum(denominator), in percent by default; nan on an empty denominator."""

    def metric(sums: Mapping[str, Any]) -> Any:
        return (100.0 if percent else 1.0) * np.divide(sums[numerator], np.asarray(sums[denominator], dtype=np.float64))

    return metric
