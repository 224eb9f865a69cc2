"""Paired statistics on scores: whole pictures are resampled, since the questions of one picture are dependent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist

import numpy as np

from ..errors import UsageError
from . import resample
from .base import Floats, Score


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap interval.

    Args:
        value: the figure over all items.
        low: lower end of the percentile interval; nan if it cannot be given.
        high: upper end.
        sd: standard deviation over the replicates.
        clusters: number of pictures.
    """

    value: float
    low: float
    high: float
    sd: float
    clusters: int


@dataclass(frozen=True)
class Difference:
    """A paired difference, other minus reference, on the same items.

    Args:
        reference: the reference's figure.
        value: the other run's figure.
        difference: value - reference.
        low: lower end of the difference's percentile interval.
        high: upper end.
        p: two-sided sign-flip p value.
        detectable: smallest true difference found with the asked power.
        clusters: number of pictures.
    """

    reference: float
    value: float
    difference: float
    low: float
    high: float
    p: float
    detectable: float
    clusters: int


@dataclass(frozen=True)
class McNemar:
    """Discordant pairs and the exact two-sided p value.

    Args:
        gained: pictures with 1 in the other run only.
        lost: pictures with 1 in the reference only.
        p: two-sided p value.
    """

    gained: int
    lost: int
    p: float


@dataclass(frozen=True)
class Spread:
    """Where the variance of a figure comes from.

    Args:
        mean: figure of the column sums averaged over seeds.
        seed_sd: standard deviation of the single seeds' figures.
        item_sd: standard deviation due to the choice of pictures, what the seeds explain removed.
        low: lower end of the interval of `mean`.
        high: upper end.
        seeds: number of seeds.
    """

    mean: float
    seed_sd: float
    item_sd: float
    low: float
    high: float
    seeds: int


def cluster_sums(score: Score) -> tuple[list[str], Floats]:
    """Column sums per picture: names in order of appearance, and a [clusters, columns] array."""
    index: dict[str, int] = {}
    rows = np.array([index.setdefault(name, len(index)) for name in score.clusters], dtype=np.int64)
    sums = np.zeros((len(index), len(score.columns)))
    np.add.at(sums, rows, score.values)
    return list(index), sums


def aligned(reference: Score, other: Score) -> Score:
    """`other` with its rows in the order of `reference`.

    Raises:
        UsageError: naming ids that only one of them holds, repeated ids, other pictures or other columns.
    """
    for name, score in (("reference", reference), ("other run", other)):
        if len(set(score.ids)) != len(score.ids):
            seen: set[str] = set()
            repeated = [i for i in score.ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
            raise UsageError(f"the {name} holds the same item twice: {_some(repeated)}; score each item once")
    place = {name: row for row, name in enumerate(other.ids)}
    missing, extra = [i for i in reference.ids if i not in place], sorted(set(other.ids) - set(reference.ids))
    if missing or extra:
        raise UsageError(
            f"a paired comparison needs the same items: {len(missing)} only in the reference ({_some(missing)}), "
            f"{len(extra)} only in the other run ({_some(extra)}); restrict both to the common items"
        )
    if list(reference.columns) != list(other.columns):
        raise UsageError(
            f"columns differ: {list(reference.columns)} and {list(other.columns)}; score both with one scorer"
        )
    rows = [place[i] for i in reference.ids]
    clusters = [other.clusters[row] for row in rows]
    wrong = [i for i, a, b in zip(reference.ids, reference.clusters, clusters, strict=True) if a != b]
    if wrong:
        raise UsageError(
            f"items with another picture in the other run: {_some(wrong)}; compare answers about the same pictures"
        )
    return replace(other, ids=list(reference.ids), clusters=clusters, values=other.values[rows])


def interval(score: Score, *, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> dict[str, Interval]:
    """Percentile bootstrap intervals of every metric, resampling pictures.

    Args:
        score: what a scorer returned.
        draws: number of bootstrap replicates.
        level: coverage of the interval.
        seed: of the resampling.
    """
    names, sums = cluster_sums(score)
    replicates = resample.evaluate(score, score.metrics, resample.resampled(sums, draws, seed))
    figures, result = score.figures(), {}
    for metric, values in replicates.items():
        low, high, sd = resample.summary(values, level, len(names))
        result[metric] = Interval(figures[metric], low, high, sd, len(names))
    return result


def paired(
    reference: Score,
    other: Score,
    *,
    metrics: Sequence[str] | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    power: float = 0.8,
    seed: int = 0,
) -> dict[str, Difference]:
    """Paired differences other - reference of every metric: bootstrap interval and sign-flip test, both by picture.

    The test swaps the two runs' answers about a picture with probability one half; the statistic is the absolute
    difference of the figures, so ratios of sums are tested as ratios. It enumerates all swaps for few pictures.

    Args:
        reference: score of the reference run.
        other: score of the other run, on the same items.
        metrics: names to compare; all that both know by default.
        draws: number of replicates of the bootstrap and of the test.
        level: coverage of the intervals; 1 - level is the size of the test for `detectable`.
        power: with which the smallest detectable difference would be found.
        seed: of both resamplings.

    Raises:
        UsageError: if the items, their pictures, the columns or the metrics do not agree.
    """
    other = aligned(reference, other)
    chosen = [name for name in reference.metrics if name in other.metrics] if metrics is None else list(metrics)
    for name in chosen:
        if name not in reference.metrics or name not in other.metrics:
            raise UsageError(f"metric {name!r} is not known to both runs; known: {', '.join(reference.metrics)}")
    functions = {name: reference.metrics[name] for name in chosen}
    names, first = cluster_sums(reference)
    _, second = cluster_sums(other)
    width = first.shape[1]
    joint = resample.resampled(np.concatenate([first, second], 1), draws, seed)
    boot = resample.gap_of(reference, functions, joint[:, :width], joint[:, width:])
    moved, exact = resample.swapped(second - first, draws, seed)
    flips = resample.gap_of(reference, functions, first.sum(0) + moved, second.sum(0) - moved)
    old, new = reference.figures(), other.figures()
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
    result = {}
    for name in chosen:
        low, high, sd = resample.summary(boot[name], level, len(names))
        gap = new[name] - old[name]
        result[name] = Difference(
            old[name], new[name], gap, low, high, resample.p_value(gap, flips[name], exact), z * sd, len(names)
        )
    return result


def mcnemar(reference: Score, other: Score, column: str) -> McNemar:
    """Exact McNemar test on a 0/1 column.

    Args:
        reference: score of the reference run.
        other: score of the other run, on the same items.
        column: name of the column with 1 for a right (or hallucinated) answer.

    Raises:
        UsageError: if a picture has more than one answer (they are dependent; use `paired`) or the column is not 0/1.
    """
    if len(set(reference.clusters)) != len(reference.ids):
        raise UsageError(
            f"McNemar's test needs one answer per picture, here {len(reference.ids)} answers on "
            f"{len(set(reference.clusters))} pictures; use the sign-flip test clustered by picture"
        )
    other = aligned(reference, other)
    if column not in reference.columns:
        raise UsageError(f"no column {column!r}; known: {', '.join(reference.columns)}")
    where = list(reference.columns).index(column)
    old, new = reference.values[:, where], other.values[:, where]
    if not (np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all()):
        raise UsageError(f"McNemar's test needs a 0/1 column; {column!r} holds other values")
    gained, lost = int((new > old).sum()), int((new < old).sum())
    n, tail, term = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return McNemar(gained, lost, min(1.0, float(2 * tail / 2**n)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; nan stays nan and does not count."""
    known = sorted((value, place) for place, value in enumerate(p) if value == value)
    result, running = [float("nan")] * len(p), 0.0
    for rank, (value, place) in enumerate(known):
        running = max(running, min(1.0, value * (len(known) - rank)))
        result[place] = running
    return result


def pool(scores: Sequence[Score]) -> Score:
    """One score of several seeds' runs: column values averaged item by item.

    Raises:
        UsageError: if there is none, or their items differ.
    """
    if not scores:
        raise UsageError("no run to pool; give at least one seed")
    rest = [aligned(scores[0], score) for score in scores[1:]]
    values = np.mean([scores[0].values, *(score.values for score in rest)], axis=0)
    return replace(scores[0], values=values, problems=[x for score in scores for x in score.problems])


def spread(scores: Sequence[Score], *, draws: int = 10_000, level: float = 0.95, seed: int = 0) -> dict[str, Spread]:
    """Variance over seeds and over pictures, for runs of one recipe that differ in their seed.

    Draws are independent from item to item, so the bootstrap over pictures of the seed average already holds the
    share of the seeds; `item_sd` is what remains when it is removed.

    Args:
        scores: one per seed, on the same items.
        draws: number of bootstrap replicates.
        level: coverage of the interval.
        seed: of the resampling.

    Raises:
        UsageError: for fewer than two seeds, or different items.
    """
    if len(scores) < 2:
        raise UsageError("variance over seeds needs at least two seeds")
    figures, result = [score.figures() for score in scores], {}
    for name, mean in interval(pool(scores), draws=draws, level=level, seed=seed).items():
        variance = float(np.var([figure[name] for figure in figures], ddof=1))
        items = sqrt(max(0.0, mean.sd**2 - variance / len(scores))) if mean.sd == mean.sd else mean.sd
        result[name] = Spread(mean.value, sqrt(variance), items, mean.low, mean.high, len(scores))
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "") if names else "none"
