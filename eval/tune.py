"""Hyper-parameters chosen on the tuning split: declared grids, equal chances for every method, never the test split."""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from . import stats
from .base import Item, Score
from .baselines import parts_of, split
from .judge import direction

SPLITS = ("tuning", "train", "dev", "val", "own")
"""Splits that may be tuned on."""

Measure = Callable[[str, Sequence[Item]], tuple[Score, float]]
"""(recipe text, items) -> score on these items, and cost (ms per token)."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate, measured.

    Args:
        method: recipe text of its grid.
        recipe: its own recipe text.
        score: on the items of its last round.
        loss: hallucination, lower is better.
        recall: higher is better.
        cost: ms per token.
    """

    method: str
    recipe: str
    score: Score
    loss: float
    recall: float
    cost: float

    @property
    def aims(self) -> tuple[float, float, float]:
        """What is minimised: hallucination, minus recall, cost."""
        return self.loss, -self.recall, self.cost


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Args:
        reference: greedy on all tuning items.
        finalists: candidates measured on all tuning items.
        front: finalists and reference that no other beats in hallucination, recall and cost at once.
        chosen: grid's recipe text -> finalist with the least hallucination whose recall is not below the bound.
        gains: the same keys -> paired difference to greedy of the hallucination metric.
        n_candidates: candidates of every method.
        notes: what the user must know, too few items above all.
    """

    reference: Trial
    finalists: Sequence[Trial]
    front: Sequence[Trial]
    chosen: Mapping[str, Trial]
    gains: Mapping[str, stats.Difference]
    n_candidates: int
    notes: Sequence[str]


def check_split(name: str | None, items: Sequence[Item], test: Collection[str] = ()) -> None:
    """Refuses items of a test split.

    Args:
        name: split of the items.
        items: to tune on.
        test: pictures of the test split, where they are known.

    Raises:
        UsageError: if the split is not one of `SPLITS` or shares a picture with the test split.
    """
    if name not in SPLITS:
        stated = "whose split is unknown" if name is None else f"of the split {name!r}"
        raise UsageError(
            f"items {stated} cannot be tuned on: figures on items that chose the hyper-parameters prove nothing"
            f"{nearest(name or '', SPLITS)}; use the tuning split, or your own --questions"
        )
    shared = sorted({item.image for item in items} & set(test))
    if shared:
        raise UsageError(f"{len(shared)} pictures are in the test split too: {', '.join(shared[:3])}; leave them out")


def split_of(source: str | Path) -> str | None:
    """Split that a folder of scenes (or its instances file) says it holds; None if it does not say."""
    path = Path(source)
    path = path / "instances.json" if path.is_dir() else path
    try:
        info = json.loads(path.read_text(encoding="utf-8")).get("info") or {}
    except (OSError, ValueError, AttributeError):
        return None
    found = re.search(r"\bsplit (\w+)", str(info.get("description", "")))
    return found.group(1) if found else None


def search(
    items: Sequence[Item],
    recipes: Mapping[str, Sequence[str]],
    measure: Measure,
    *,
    hallucination: str,
    recall: str = "recall",
    keep_recall: float = 2.0,
    rounds: int = 3,
    eta: int = 2,
    seed: int = 0,
    draws: int = 5000,
) -> Tuned:
    """Successive halving, method by method, every round on the same pictures for all.

    Candidates that keep greedy's recall go before those that do not, each ranked by Pareto front.

    Args:
        items: of the tuning split; check it first with `check_split`.
        recipes: candidates of each method, as `candidates.candidates` returns them.
        measure: runs a recipe on items.
        hallucination: metric to improve.
        recall: metric to keep.
        keep_recall: points of recall that a chosen candidate may lose against greedy.
        rounds: of halving; the last one is on all items.
        eta: each round keeps one in `eta` and multiplies the pictures by it.
        seed: order of the pictures.
        draws: of the resamplings.

    Raises:
        UsageError: if methods have different numbers of candidates, or a metric is unknown or has no direction.
    """
    sizes = {recipe: len(texts) for recipe, texts in recipes.items()}
    if len(set(sizes.values())) != 1 or rounds < 1:
        raise UsageError(f"methods need equal numbers of candidates and at least one round, got {sizes} and {rounds}")
    axes = (hallucination, recall)
    left = {recipe: list(texts) for recipe, texts in recipes.items()}
    trials: dict[str, list[Trial]] = {}
    for turn in range(rounds):
        part = _share(items, eta ** (turn + 1 - rounds), seed)
        reference = _trial("greedy", "greedy", part, measure, axes)
        floor = reference.recall - keep_recall
        for recipe, texts in left.items():
            found = [_trial(recipe, text, part, measure, axes) for text in texts]
            keeping = ranked([trial for trial in found if trial.recall >= floor])
            trials[recipe] = keeping + ranked([trial for trial in found if trial.recall < floor])
            if turn + 1 < rounds:
                left[recipe] = [trial.recipe for trial in trials[recipe][: ceil(len(texts) / eta)]]
    finalists = [trial for found in trials.values() for trial in found]
    chosen, gains, notes = {}, {}, []
    for recipe, found in trials.items():
        keeping = [trial for trial in found if trial.recall >= floor]
        if not keeping:
            notes.append(f"{recipe}: no candidate keeps recall within {keep_recall:g} points of greedy; none is chosen")
            continue
        best = min(keeping, key=lambda trial: trial.aims)
        gap = stats.paired(reference.score, best.score, metrics=[hallucination], draws=draws)[hallucination]
        chosen[recipe], gains[recipe] = best, gap
        if gap.difference == 0:
            notes.append(f"{recipe}: {hallucination} is that of greedy on all {len(items)} items")
        elif not abs(gap.difference) >= gap.detectable:
            notes.append(
                f"{recipe}: {hallucination} {gap.difference:+.1f} is below the smallest detectable difference of "
                f"{gap.detectable:.1f} with {len(items)} items on {gap.clusters} pictures: too few to tell"
            )
    n = next(iter(sizes.values()))
    return Tuned(reference, finalists, front([reference, *finalists]), chosen, gains, n, notes)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other trial beats: as good in hallucination, recall and cost, and better in one."""
    return [one for one in trials if not any(_beats(other, one) for other in trials)]


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Trials by Pareto front, then by hallucination, recall and cost."""
    left, result = list(trials), list[Trial]()
    while left:
        first = sorted(front(left), key=lambda trial: trial.aims)
        result += first
        left = [trial for trial in left if trial not in first]
    return result


def preset(tuned: Tuned, recipe: str, model: str, tuned_on: Mapping[str, Any], source: str) -> dict[str, Any]:
    """An entry of a preset file for the chosen candidate of a method.

    Args:
        tuned: what `search` returned.
        recipe: key of `tuned.chosen`.
        model: checkpoint.
        tuned_on: benchmark, split, number of items and pictures, hash of the questions.
        source: who tuned, with what.

    Raises:
        UsageError: if nothing was chosen for the recipe.
    """
    if recipe not in tuned.chosen:
        raise UsageError(f"nothing was chosen for {recipe!r}{nearest(recipe, tuned.chosen)}")
    trial, gap = tuned.chosen[recipe], tuned.gains[recipe]
    settings = {name: dict(_settings(arguments)) for name, arguments in parts_of(trial.recipe)}
    return {
        "checkpoints": [model.rstrip("/").rpartition("/")[2]],
        "source": source,
        "recipe": trial.recipe,
        "methods": settings,
        "tuned_on": dict(tuned_on),
        "n_candidates": tuned.n_candidates,
        "hallucination": {"greedy": gap.reference, "tuned": gap.value, "low": gap.low, "high": gap.high, "p": gap.p},
        "recall": {"greedy": tuned.reference.recall, "tuned": trial.recall},
    }


def _trial(method: str, recipe: str, items: Sequence[Item], measure: Measure, axes: tuple[str, str]) -> Trial:
    score, cost = measure(recipe, items)
    figures = score.figures()
    for name in axes:
        if name not in figures or not direction(name):
            known = [metric for metric in figures if direction(metric)]
            raise UsageError(f"cannot tune for {name!r}{nearest(name, known)}")
    loss = -direction(axes[0]) * figures[axes[0]]
    return Trial(method, recipe, score, loss, direction(axes[1]) * figures[axes[1]], cost if cost == cost else 0.0)


def _beats(one: Trial, other: Trial) -> bool:
    """No worse in hallucination, recall and cost, and better in one; costs within 5 % are equal."""
    a, b = one.aims, other.aims
    costs = (0.0, 0.0) if abs(a[2] - b[2]) <= 0.05 * max(a[2], b[2]) else (a[2], b[2])
    first, second = (*a[:2], costs[0]), (*b[:2], costs[1])
    return first != second and all(x <= y for x, y in zip(first, second, strict=True))


def _share(items: Sequence[Item], share: float, seed: int) -> list[Item]:
    """Items of the first pictures in an order drawn from the seed; smaller shares are contained in larger ones."""
    pictures = sorted({item.image for item in items})
    random.Random(seed).shuffle(pictures)
    kept = set(pictures[: max(1, ceil(share * len(pictures)))])
    return [item for item in items if item.image in kept]


def _settings(arguments: str) -> list[tuple[str, Any]]:
    pairs = [piece.partition("=") for piece in split(arguments, ",") if piece.strip()]
    return [(key.strip(), ast.literal_eval(value.strip())) for key, _, value in pairs]
