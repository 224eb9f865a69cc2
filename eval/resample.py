"""Resampling of column sums: bootstrap over pictures and swaps of two runs' answers about a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import UsageError
from .base import Floats, Metric, Score

EXACT_CLUSTERS = 13
"""Up to this many pictures the sign-flip test enumerates every swap."""
_CHUNK = 2_000_000
_MAX_UNDEFINED = 0.05


def resampled(sums: Floats, draws: int, seed: int) -> Floats:
    """[draws, columns] sums over pictures drawn with replacement."""
    rng, count = np.random.default_rng(seed), len(sums)
    if count == 0:
        raise UsageError("no item to compare; the run holds no scored answer")
    share = np.full(count, 1 / count)
    return np.concatenate(
        [rng.multinomial(count, share, size=n).astype(np.float64) @ sums for n in _chunks(draws, count)]
    )


def swapped(change: Floats, draws: int, seed: int) -> tuple[Floats, bool]:
    """[draws, columns] sums of what moves when pictures are swapped at random; whether these are all swaps."""
    count = len(change)
    if count <= EXACT_CLUSTERS:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return bits.astype(np.float64) @ change, True
    rng = np.random.default_rng([seed, 1])
    return np.concatenate(
        [rng.integers(0, 2, (n, count)).astype(np.float64) @ change for n in _chunks(draws, count)]
    ), False


def _chunks(draws: int, count: int) -> Iterator[int]:
    size = max(1, _CHUNK // count)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def evaluate(score: Score, metrics: Mapping[str, Metric], sums: Floats) -> dict[str, Floats]:
    """[draws] values of each metric at [draws, columns] column sums."""
    named: dict[str, Any] = {column: sums[:, place] for place, column in enumerate(score.columns)}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: np.broadcast_to(np.asarray(f(named), dtype=np.float64), len(sums)) for name, f in metrics.items()}


def gap_of(score: Score, metrics: Mapping[str, Metric], first: Floats, second: Floats) -> dict[str, Floats]:
    """[draws] differences, second minus first, of each metric."""
    old, new = evaluate(score, metrics, first), evaluate(score, metrics, second)
    return {name: new[name] - old[name] for name in metrics}


def summary(values: Floats, level: float, clusters: int) -> tuple[float, float, float]:
    """Ends of the percentile interval and the standard deviation; nan for one picture or if many replicates are."""
    finite = values[np.isfinite(values)]
    if clusters < 2 or len(finite) < (1 - _MAX_UNDEFINED) * len(values):
        return float("nan"), float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), float(finite.std(ddof=1))


def p_value(gap: float, flips: Floats, exact: bool) -> float:
    """Share of swaps at least as extreme; an undefined swap counts as extreme."""
    if gap != gap:
        return float("nan")
    extreme = int((~(np.abs(flips) < abs(gap) * (1 - 1e-9) - 1e-12)).sum())
    return extreme / len(flips) if exact else (extreme + 1) / (len(flips) + 1)
