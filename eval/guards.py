"""Columns that stand in every table: length, repetition and emptiness of the answers, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UsageError
from .base import Item, Score, ratio
from .benchmarks.text import METRICS, quality

Record = Mapping[str, Any]
TEXT = ("length", "rep_4", "distinct_4", "empty")
COST = ("ms_per_token", "prefill_ms", "extra_rows", "peak_mib")
_READ = ("seconds", "tokens", "prefill_seconds", "extra_rows")


def text_score(items: Sequence[Item], records: Mapping[str, Record]) -> Score:
    """Text quality of answers as a score.

    Words are runs of [a-z0-9'] of the lower-cased answer; 4-grams are counted within one answer. Metrics: `length` mean
    words, `rep_4` mean share of repeated 4-grams in %, `distinct_4` distinct among all 4-grams in %, `empty` share of
    answers without any character but blanks in %.

    Args:
        items: the items; those without an answer are left out.
        records: item id -> record with `text`.
    """
    kept = [item for item in items if item.id in records]
    rows = [quality(records[item.id]["text"]) for item in kept]
    columns = list(quality(""))
    return Score(
        ids=[item.id for item in kept],
        clusters=[item.image for item in kept],
        columns=columns,
        values=np.array([[row[name] for name in columns] for row in rows]).reshape(len(rows), len(columns)),
        metrics={"length": METRICS["tokens"]} | {name: METRICS[name] for name in TEXT if name != "length"},
    )


def cost_score(items: Sequence[Item], records: Mapping[str, Record]) -> Score:
    """Cost of answers as a score; a figure that not every record can give is nan.

    Read from a record: `seconds` (wall time, an item's share of its batch), `tokens` (new), `prefill_seconds`,
    `extra_rows` (rows of the batch beyond the visible ones, per item). Metrics: `ms_per_token` all time over all
    tokens, `prefill_ms` and `extra_rows` means.
    """
    kept = [item for item in items if item.id in records]
    values = [[1.0, *(_number(records[item.id].get(key)) for key in _READ)] for item in kept]
    return Score(
        ids=[item.id for item in kept],
        clusters=[item.image for item in kept],
        columns=("timed", *_READ),
        values=np.array(values, dtype=np.float64).reshape(len(values), 1 + len(_READ)),
        metrics={
            "ms_per_token": _thousandfold("seconds", "tokens"),
            "prefill_ms": _thousandfold("prefill_seconds", "timed"),
            "extra_rows": ratio("extra_rows", "timed", percent=False),
        },
    )


def peak_mib(records: Mapping[str, Record]) -> float | None:
    """Highest memory over the weights of any record (`peak_bytes`) in MiB; None if not recorded."""
    peaks = [record["peak_bytes"] for record in records.values() if isinstance(record.get("peak_bytes"), (int, float))]
    return max(peaks) / 2**20 if peaks else None


def join(first: Score, *others: Score) -> Score:
    """One score with the columns and metrics of several on the same items, so that one resampling serves all.

    A metric or column of a later score never replaces one of an earlier score.

    Raises:
        UsageError: if the ids differ.
    """
    for other in others:
        if list(other.ids) != list(first.ids):
            raise UsageError("scores of different items cannot stand in one row; score the same answers")
        taken, known = set(first.columns), dict(first.metrics)
        names = [f"{name}'" if name in taken else name for name in other.columns]
        renamed = dict(zip(other.columns, names, strict=True))
        for name, metric in other.metrics.items():
            known.setdefault(name, _renamed(metric, renamed))
        first = replace(
            first,
            columns=[*first.columns, *names],
            values=np.concatenate([first.values, other.values], 1),
            metrics=known,
            problems=[*first.problems, *other.problems],
        )
    return first


def restrict(score: Score, ids: Sequence[str]) -> Score:
    """The rows of some ids, in their order."""
    place = {name: row for row, name in enumerate(score.ids)}
    rows = [place[name] for name in ids]
    return replace(score, ids=list(ids), clusters=[score.clusters[row] for row in rows], values=score.values[rows])


def _renamed(metric: Any, names: Mapping[str, str]) -> Any:
    if all(old == new for old, new in names.items()):
        return metric
    return lambda sums: metric({old: sums[new] for old, new in names.items()})


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _thousandfold(numerator: str, denominator: str) -> Any:
    plain = ratio(numerator, denominator, percent=False)
    return lambda sums: 1000.0 * plain(sums)
