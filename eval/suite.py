"""A grid of runs, from questions to answers: what `vlmfix eval` does first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import Refusal, UsageError
from . import compare, figures, protocol, stored, table
from .base import Item
from .baselines import Arm, other_pictures
from .benchmarks import Benchmark
from .benchmarks.answers import pictures as find_pictures
from .benchmarks.files import Problems
from .grid import Grid
from .runner import Answerer, Estimate, GaveUp, Outcome, estimate, evaluate
from .spec import Spec, hash_questions, hash_truth
from .store import Store
from .world import world


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
    refused: dict[str, str] | None = None,
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
        refused: takes, for arms that cannot act on the model or fail on every item, the reason; without it, and for
            the reference, that is an error.
    """
    plain = benchmark.items()
    pictures = pictures or folder(grid.images, plain)
    short = benchmark.max_new_tokens <= SHORT and not getattr(benchmark, "suffix", "")
    truth, runs = hash_truth(plain), []

    @functools.cache
    def asked(suffix: str) -> tuple[Sequence[Item], str]:
        items = [replace(item, prompt=item.prompt + suffix) for item in plain] if suffix else plain
        return items, hash_questions(items)

    for arm in arms:
        if arm.derive:
            continue
        try:
            answerer = open(arm)
        except Refusal as error:
            if refused is None or arm.kind == "reference":
                raise
            refused[arm.name] = str(error)
            continue
        described = answerer.describe()
        grade, family = str(described.pop("grade", "")), str(described.pop("family", ""))
        frame = protocol.find(grid.protocol, family)
        suffix = arm.suffix + (frame.short if short else "")
        items, questions = asked(suffix)
        settings = {"max_new_tokens": benchmark.max_new_tokens, **grid.generation, **arm.settings}
        if frame.system is not None:
            settings["system"] = frame.system
        for seed in grid.seeds if settings.get("do_sample") else (None,):
            spec = Spec(
                **described,
                benchmark=benchmark.label,
                questions=questions,
                truth=truth,
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
            if arm.settings.get("placebo") == "other-picture":
                answerer.show_others(others(plain, int(arm.settings.get("placebo_seed", 0)), opened))  # type: ignore[attr-defined]
            if dry:
                done = made.store.done(retry_errors)
                found = estimate(part, answerer, done=done, processes=world().size, **how)
                runs.append(replace(made, estimate=found))
                continue
            spec.write(place)
            stored.note(place, spec, asdict(arm), grade, suffix)
            told = (lambda done, total, name=arm.name: progress(name, done, total)) if progress else None
            try:
                with made.store:
                    outcome = evaluate(part, answerer, made.store, retry_errors=retry_errors, progress=told, **how)
            except GaveUp as error:
                if refused is None or arm.kind == "reference":
                    raise
                refused[arm.name] = str(error)
                break
            runs.append(replace(made, outcome=outcome))
        getattr(answerer, "close", lambda: None)()
    return runs


def others(items: Sequence[Item], seed: int, opened: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """Opens, for a picture's name, the picture of another item."""
    other = other_pictures(items, seed)
    return lambda name: opened(other[name]) if opened else other[name]


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
