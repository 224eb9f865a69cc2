"""Yes minus no: how well the margin separates, and what moving the threshold alone would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..base import Floats, Metric, ratio
from .answers import Reply
from .files import Problems


def margin_columns(replies: Sequence[Reply], problems: Problems) -> list[dict[str, float]]:
    """Columns for the AUROC of `margin` and for the accuracy at the best threshold; zeros unless every record has one.

    The AUROC is written as a sum over items (placement values, DeLong), so that resampling items gives its interval
    to first
    order: sum of the positives' placements / positives + sum of the negatives' / negatives - the figure itself.
    """
    names = ("margins", "yes_items", "no_items", "yes_placement", "no_placement", "auroc", "best_right", "best_offset")
    missing = [r.item.id for r in replies if not isinstance(r.record.get("margin"), (int, float))]
    if missing and len(missing) < len(replies):
        for name in missing:
            problems.add("answers without a margin, so no AUROC", name)
    if missing or not replies:
        return [dict.fromkeys(names, 0.0) for _ in replies]
    margin = np.array([reply.record["margin"] for reply in replies], np.float64)
    yes = np.array([reply.item.truth["label"] == "yes" for reply in replies])
    places = np.empty(len(replies))
    for this, other, sign in ((yes, ~yes, 1.0), (~yes, yes, -1.0)):
        rivals = np.sort(sign * margin[other])
        below, up_to = (np.searchsorted(rivals, sign * margin[this], side) for side in ("left", "right"))
        places[this] = (below + up_to) / 2 / max(len(rivals), 1)
    offset = best_offset(margin, yes)
    right = (margin > offset) == yes
    figure = places[yes].mean() if yes.any() and not yes.all() else np.nan
    rows = zip(yes, places, right, strict=True)
    return [
        dict(zip(names, map(float, (1, y, not y, p * y, p * (not y), figure, r, offset)), strict=True))
        for y, p, r in rows
    ]


def best_offset(margin: Floats, yes: NDArray[np.bool_]) -> float:
    """Threshold on the margin with the most right answers; of equals, the one nearest to 0.

    Args:
        margin: logit of yes minus logit of no, [items].
        yes: whether yes is right, [items].
    """
    order = np.argsort(margin)
    cuts, ranks = np.unique(margin[order], return_index=True)
    edges = np.concatenate([[cuts[0] - 1], (cuts[:-1] + cuts[1:]) / 2, [cuts[-1] + 1]])
    ranks = np.append(ranks, len(margin))
    negatives_below = np.concatenate([[0], np.cumsum(~yes[order])])[ranks]
    positives_above = yes.sum() - np.concatenate([[0], np.cumsum(yes[order])])[ranks]
    right = negatives_below + positives_above
    low, high = np.append(-np.inf, cuts), np.append(cuts, np.inf)
    edges = np.where((low <= 0) & (high > 0), 0.0, edges)  # 0 itself where it lies between the same two margins
    best = edges[right == right.max()]
    return float(best[np.abs(best).argmin()])


METRICS: Mapping[str, Metric] = {
    "auroc": lambda s: (
        100.0 * (s["yes_placement"] / s["yes_items"] + s["no_placement"] / s["no_items"] - s["auroc"] / s["margins"])
    ),
    "best_accuracy": ratio("best_right", "margins"),
    "best_offset": ratio("best_offset", "margins", percent=False),
}
"""Figures of `margin_columns`."""
