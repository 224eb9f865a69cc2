"""Answers that were made before, perhaps on another machine: from their folder to the runs of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .baselines import Arm
from .benchmarks import Benchmark
from .grid import Grid
from .runner import chosen
from .spec import Spec, hash_questions
from .store import Store

if TYPE_CHECKING:
    from .suite import Run

REFUSED = "refused.json"


def note(place: Path, spec: Spec, arm: Mapping[str, Any], grade: str, suffix: str) -> None:
    """Writes beside the answers of a run which row it is, as `run-HASH.json`.

    Args:
        place: folder of the answers.
        spec: of the run.
        arm: fields of the `Arm`.
        grade: evidence grade.
        suffix: that the row appends to every prompt.
    """
    path = place / f"run-{spec.hash[:16]}.json"
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other processes write the same
    beside.write_text(json.dumps({"arm": arm, "grade": grade, "suffix": suffix}) + "\n", encoding="utf-8")
    os.replace(beside, path)


def note_refused(folder: Path, benchmark: str, refused: Mapping[str, str]) -> None:
    """Adds the reasons of rows that cannot act on the model to the folder's `refused.json`.

    Args:
        folder: of all runs.
        benchmark: its label.
        refused: row -> reason.
    """
    path = folder / REFUSED
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[benchmark] = {**known.get(benchmark, {}), **refused}
    if refused:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def runs(grid: Grid, benchmark: Benchmark, arms: Sequence[Arm], folder: str | Path) -> tuple[list[Run], dict[str, str]]:
    """The complete runs of a folder; needs no model.

    Args:
        grid: the grid.
        benchmark: one of its benchmarks.
        arms: its rows.
        folder: what `suite.run` wrote to.

    Returns:
        The runs, and per row that has none why.

    Raises:
        UsageError: if there are answers to other questions, or two runs of one row.
    """
    from .suite import Run

    known = _read(Path(folder), grid, benchmark)
    beside = Path(folder) / REFUSED
    refused = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    reasons = refused.get(benchmark.label, {})
    plain = benchmark.items()
    found: list[Run] = []
    missing: dict[str, str] = {}
    for arm in arms:
        if arm.derive:
            continue
        seeds: Sequence[int | None] = grid.seeds if arm.settings.get("do_sample") else (None,)
        mine = []
        for seed in seeds:
            settings = _json({"max_new_tokens": benchmark.max_new_tokens, **grid.generation, **arm.settings})
            near = [
                (spec, row, place)
                for spec, row, place in known
                if row["arm"] == _json(asdict(arm))
                and spec.seed == seed
                and {key: value for key, value in spec.generation.items() if key != "system"} == settings
            ]
            if len(near) > 1:
                raise UsageError(f"{folder} holds {len(near)} runs of {arm.name}; keep those of one version apart")
            if not near:
                missing[arm.name] = reasons.get(arm.name, "no answers")
                continue
            spec, row, place = near[0]
            items = [replace(item, prompt=item.prompt + row["suffix"]) for item in plain]
            if hash_questions(items) != spec.questions:
                raise UsageError(f"{place} answers other questions than {benchmark.label} asks here")
            store = Store(place, spec.answers_hash)
            wanted = {item.id for item in chosen(items, grid.limit)}
            lacking = len(wanted - store.done())
            if lacking:
                missing[arm.name] = f"{lacking} of {len(wanted)} items were not asked"
            mine.append(Run(arm, seed, spec, store, items, row["grade"]))
        if arm.name not in missing:
            found += mine
    if missing.get("greedy"):
        raise UsageError(f"{folder} lacks the reference of {benchmark.label}: {missing['greedy']}")
    return found, missing


def _read(folder: Path, grid: Grid, benchmark: Benchmark) -> list[tuple[Spec, dict[str, Any], Path]]:
    known = []
    for path in sorted(folder.glob("*/run-*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        beside = path.with_name(path.name.replace("run-", "spec-", 1))
        spec = Spec.from_json(json.loads(beside.read_text(encoding="utf-8")))
        if (spec.benchmark, spec.model, spec.protocol) == (benchmark.label, grid.model, grid.protocol):
            known.append((spec, told, path.parent))
    return known


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
