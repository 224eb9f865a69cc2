"""What counts as better, and when a gain looks bought."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from .stats import Difference

HIGHER = frozenset(
    {
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
    }
)
LOWER = frozenset(
    {"chair", "chair_s", "chair_i", "chairs", "chairi", "hal", "cog", "hallucination_rate", "hallucination"}
)
LOOPING = 10.0
"""Mean share of repeated 4-grams, in %, from which answers count as loops whatever the reference does."""


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


def direction(metric: str) -> int:
    """1 if more is better, -1 if less is, 0 if unknown; a name's last known word decides (`random/accuracy`).

    Variants in brackets (`f1[strict]`) have none: they stand beside the headline and are not tested.
    """
    for word in reversed(re.split(r"[\s/:.]+", metric.lower().replace("-", "_").replace("+", "_plus"))):
        if word in HIGHER or word in LOWER:
            return 1 if word in HIGHER else -1
    return 0


def warnings(
    figures: Mapping[str, float], moved: Mapping[str, Difference], metrics: Sequence[str], bounds: Bounds
) -> list[str]:
    """Guards beyond their bounds in a row with a gain; loops always.

    Args:
        figures: of the row.
        moved: differences to the reference.
        metrics: the benchmark's own.
        bounds: of the guards.
    """
    gains = [f"{name} {moved[name].difference:+.1f}" for name in metrics if name in moved and _gain(name, moved[name])]
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
    if figures.get("rep_4", 0.0) >= LOOPING:
        found.append(f"answers loop: {figures['rep_4']:.1f} % of 4-grams are repeats")
    return found


def _gain(name: str, gap: Difference) -> bool:
    """Whether a metric moved the right way with its whole interval (or has none)."""
    sign = direction(name)
    if not sign or gap.difference * sign <= 0:
        return False
    return min(gap.low * sign, gap.high * sign) > 0 if isfinite(gap.low + gap.high) else True
