"""A grid of runs, from questions to tables: what `vlmfix eval` does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError
from . import compare, figures, foreign, protocol, table
from .base import Item, Score
from .baselines import Arm, derived
from .benchmarks import Benchmark
from .benchmarks.answers import pictures as find_pictures
from .benchmarks.files import Problems
from .grid import Grid
from .guards import Record
from .runner import Answerer, Estimate, Outcome, chosen, estimate, evaluate
from .spec import Spec, hash_questions, hash_truth
from .store import Store
from .world import wait, world


class Described(Answerer, Protocol):
    """An answerer that knows the fields of `Spec` that the model decides."""

    def describe(self) -> dict[str, Any]:
        """Keyword arguments of `Spec`, the evidence grade as `grade` and transformers' model type as `family`."""
        ...


SHORT = 32
"""Benchmarks with at most this token limit want a word or two."""

Open = Callable[[Arm], Described]
"""Arm -> its answerer; called when the arm's turn comes."""

Progress = Callable[[str, int, int], None]
"""Row, done and all items."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed on one benchmark.

    Args:
        arm: the row it belongs to.
        seed: of the draws, None for deterministic decoding.
        spec: what it is.
        store: where its answers are.
        items: the questions as this arm asks them.
        grade: evidence grade of its recipe.
        outcome: of this process; None for a dry run.
        estimate: of a dry run.
    """

    arm: Arm
    seed: int | None
    spec: Spec
    store: Store
    items: Sequence[Item]
    grade: str = ""
    outcome: Outcome | None = None
    estimate: Estimate | None = None


def run(
    grid: Grid,
    benchmark: Benchmark,
    arms: Sequence[Arm],
    open: Open,
    out: str | Path,
    *,
    pictures: Callable[[str], Any] | None = None,
    only: Collection[str] | None = None,
    retry_errors: bool = False,
    dry: bool = False,
    progress: Progress | None = None,
) -> list[Run]:
    """Answers a benchmark with every arm that needs the model; each run has a folder named by its hash.

    Args:
        grid: the grid.
        benchmark: one of its benchmarks.
        arms: its rows.
        open: gives the answerer of an arm.
        out: folder of all runs.
        pictures: opens a picture by name; by default files are looked for in the grid's folder `images`.
        only: ids of the items to answer now; all by default. They belong to the same run whichever they are.
        retry_errors: whether failed items are asked again.
        dry: only estimate.
        progress: told after every batch.
    """
    plain = benchmark.items()
    pictures = pictures or folder(grid.images, plain)
    short = benchmark.max_new_tokens <= SHORT and not getattr(benchmark, "suffix", "")
    runs = []
    for arm in arms:
        if arm.derive:
            continue
        answerer = open(arm)
        described = answerer.describe()
        grade, family = str(described.pop("grade", "")), str(described.pop("family", ""))
        frame = protocol.find(grid.protocol, family)
        suffix = arm.suffix + (frame.short if short else "")
        items = [replace(item, prompt=item.prompt + suffix) for item in plain] if suffix else plain
        settings = {"max_new_tokens": benchmark.max_new_tokens, **grid.generation, **arm.settings}
        if frame.system is not None:
            settings["system"] = frame.system
        for seed in grid.seeds if settings.get("do_sample") else (None,):
            spec = Spec(
                **described,
                benchmark=benchmark.label,
                questions=hash_questions(items),
                truth=hash_truth(items),
                scorer=benchmark.label,
                protocol=grid.protocol,
                generation=settings,
                seed=seed,
            )
            place = Path(out) / spec.answers_hash[:16]
            made = Run(arm, seed, spec, Store(place, spec.answers_hash), items, grade)
            opened = protocol.opener(frame, described.get("processor", {}), pictures)
            how: dict[str, Any] = {"pictures": opened, "batch_size": grid.batch_size, "limit": grid.limit}
            how["settings"] = settings if seed is None else {**settings, "seed": seed}
            part = items if only is None else [item for item in items if item.id in only]
            if dry:
                done = made.store.done(retry_errors)
                found = estimate(part, answerer, done=done, processes=world().size, **how)
                runs.append(replace(made, estimate=found))
                continue
            spec.write(place)
            with made.store:
                told = (lambda done, total, name=arm.name: progress(name, done, total)) if progress else None
                outcome = evaluate(part, answerer, made.store, retry_errors=retry_errors, progress=told, **how)
            runs.append(replace(made, outcome=outcome))
    return runs


def folder(images: str, items: Sequence[Item]) -> Callable[[str], Any] | None:
    """Opens pictures of a folder by the items' names; None without a folder, so that names are used as paths.

    Raises:
        UsageError: if no picture is there.
    """
    if not images:
        return None
    problems = Problems()
    found = find_pictures(items, images, problems)
    wanted = {item.image for item in items if item.image}
    if wanted and not found:
        raise UsageError(f"{images} holds none of the {len(wanted)} pictures ({', '.join(sorted(wanted)[:3])}, ...)")

    def opened(name: str) -> Any:
        if name not in found:
            raise UsageError(f"no picture {name} in {images}")
        return found[name]

    return opened


def rows(
    grid: Grid,
    benchmark: Benchmark,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    add: Mapping[str, Sequence[Record]] | None = None,
    patience: float = 1800.0,
) -> list[compare.Row]:
    """Rows of a benchmark's table, in the order of the arms, foreign answers last; waits for other processes' answers.

    Args:
        grid: the grid.
        benchmark: the benchmark.
        arms: its rows.
        runs: what `run` returned.
        add: name -> foreign records.
        patience: see `world.wait`.
    """
    items, made = chosen(benchmark.items(), grid.limit), []
    reference: list[Record] = []
    for arm in arms:
        mine = [run for run in runs if run.arm.name == arm.name]
        notes: list[str] = []
        if arm.derive:
            answers = [derived(arm, reference)]
        else:
            answers = []
            for run in mine:
                wait(run.store, {item.id for item in items}, patience)
                merged = run.store.read()
                answers.append([merged.answers[item.id] for item in items if item.id in merged.answers])
                notes += [*merged.problems[:5], *_failures(list(merged.errors.values()))]
            if arm.kind == "reference":
                reference = answers[0]
        made.append(
            _row(arm.name, arm.kind, mine[0].grade if mine else "", items, benchmark, answers, notes, grid.limit)
        )
    for name, records in (add or {}).items():
        asked = next((chosen(run.items, grid.limit) for run in runs if run.arm.kind == "reference"), items)
        found, notes = foreign.checked(name, records, benchmark, asked)
        made.append(_row(name, "foreign", "", items, benchmark, [found], notes, grid.limit))
    return made


def write(comparison: compare.Comparison, out: str | Path, columns: Sequence[str] = ()) -> list[Path]:
    """Writes a table as table.md, table.tex and table.json and its forest plot as forest.svg; returns the paths."""
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    built = table.build(comparison, list(columns) or None)
    texts = {
        "table.md": table.markdown(built),
        "table.tex": table.latex(built),
        "table.json": table.as_json(comparison),
    }
    if len(comparison.lines) > 1 and comparison.metrics:
        texts["forest.svg"] = figures.forest(comparison)
    for name, text in texts.items():
        (place / name).write_text(text, encoding="utf-8")
    return [place / name for name in texts]


def _row(
    name: str,
    kind: str,
    grade: str,
    items: Sequence[Item],
    benchmark: Benchmark,
    answers: Sequence[Sequence[Record]],
    notes: Sequence[str],
    limit: int | None,
) -> compare.Row:
    scores: list[Score] = [benchmark.score(records) for records in answers]
    told = [
        line for score in scores for line in score.problems if limit is None or "items without an answer" not in line
    ]
    by_id = [{str(record["id"]): record for record in records} for records in answers]
    return compare.row(name, items, by_id, scores, kind, grade, list(dict.fromkeys([*notes, *told])))


def _failures(errors: Sequence[Record]) -> list[str]:
    if not errors:
        return []
    first = errors[0]
    return [f"{len(errors)} items failed and are not scored, first {first['id']!r}: {first['error']}"]
