"""A recipe measured on items of a benchmark, with answers kept from one time to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import VlmfixError
from . import suite
from .base import Item, Score
from .baselines import Arm
from .benchmarks import Benchmark
from .grid import Grid
from .guards import cost_score, restrict
from .tune import Measure
from .world import wait


def measurer(
    grid: Grid,
    benchmark: Benchmark,
    open: suite.Open,
    out: str | Path,
    pictures: Callable[[str], Any] | None = None,
    patience: float = 1800.0,
) -> Measure:
    """What `tune.search` measures with: answers come from the store where they are there already.

    Args:
        grid: settings of the runs; its methods do not count.
        benchmark: the tuning items and their scorer.
        open: gives the answerer of an arm.
        out: folder of the answers.
        pictures: as in `suite.run`.
        patience: see `world.wait`.
    """
    grid = replace(grid, limit=None)

    def measure(recipe: str, items: Sequence[Item]) -> tuple[Score, float]:
        ids = [item.id for item in items]
        arm = Arm(recipe, "method", recipe)
        (run,) = suite.run(grid, benchmark, [arm], open, out, pictures=pictures, only=set(ids))
        wait(run.store, ids, patience)
        merged = run.store.read()
        failed = [key for key in ids if key in merged.errors]
        if failed:
            raise VlmfixError(
                f"{recipe}: {len(failed)} tuning items failed, first {failed[0]!r}: "
                f"{merged.errors[failed[0]]['error']}; leave these items out, so that all candidates answer the same"
            )
        answers = {key: merged.answers[key] for key in ids}
        score = benchmark.score(list(answers.values()))
        return restrict(score, ids), cost_score(items, answers).figures()["ms_per_token"]

    return measure
