"""`vlmfix tune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note, show, table
from vlmfix.commands.grids import GridOptions
from vlmfix.commands.options import Json

if TYPE_CHECKING:
    from vlmfix.eval.benchmarks import Benchmark
    from vlmfix.eval.grid import Grid
    from vlmfix.eval.tune import Trial, Tuned

AIMS = {"chair": "chair_i", "amber": "chair", "pope": "accuracy", "mme": "acc"}
"""Benchmark -> metric that is improved by default."""


def tune(
    grids: Annotated[Path, typer.Argument(help='TOML file: a table ["RECIPE"] with lists of values per setting.')],
    given: GridOptions,
    benchmark: Annotated[
        str, typer.Option("--benchmark", "-b", help="Benchmark, with --images and its options.")
    ] = "chair",
    questions: Annotated[
        Path | None, typer.Option(help="Your own yes/no items instead: .csv or .jsonl with image, question, answer.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="What the items are: tuning, train, dev or val; never test.")
    ] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", "-n", min=1, help="Per method; all of the smallest grid by default.")
    ] = None,
    aim: Annotated[str | None, typer.Option(help="Metric to improve.")] = None,
    recall: Annotated[str, typer.Option(help="Metric to keep.")] = "recall",
    keep_recall: Annotated[float, typer.Option(min=0, help="Points of it that may be lost.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of halving; the last one is on all items.")] = 3,
    as_json: Json = False,
) -> None:
    """Choose hyper-parameters on the tuning split, with the same number of candidates for every method.

    Writes OUT/preset.json with the chosen settings, what they were tuned on and how many candidates there were.
    With --images scenes:tuning the scenes are drawn. Items of a test split are refused.

    Exit code: 0 all methods tuned, 1 for some none was chosen or the items are too few, 2 wrong usage.
    """
    from vlmfix.eval import tune as tuning
    from vlmfix.eval.candidates import candidates as declared
    from vlmfix.eval.candidates import read_grids
    from vlmfix.eval.measure import measurer
    from vlmfix.eval.questions import too_few
    from vlmfix.eval.runner import chosen
    from vlmfix.eval.spec import hash_questions

    recipes = declared(read_grids(grids), candidates)
    grid, made, known = _items(given, benchmark, questions)
    items = chosen(made.items(), grid.limit)
    stated = "own" if questions else split or known
    tuning.check_split(stated if known is None or stated == "own" else known, items)
    metric = aim or ("hallucination" if questions else AIMS.get(benchmark, "accuracy"))
    opener = given.opener(grid, (text for texts in recipes.values() for text in texts))
    measure = measurer(grid, made, opener, given.out / "answers")
    found = tuning.search(
        items, recipes, measure, hallucination=metric, recall=recall, keep_recall=keep_recall, rounds=rounds
    )
    notes = list(found.notes)
    if questions and (flaw := too_few(found.reference.score)):
        notes.insert(0, flaw)
    about = {
        "benchmark": made.label, "split": stated, "items": len(items), "pictures": len({i.image for i in items}),
        "questions": hash_questions(items),
    }  # fmt: skip
    source = f"vlmfix tune, {len(items)} items, aim {metric}"
    presets = [tuning.preset(found, recipe, grid.model, about, source) for recipe in found.chosen]
    place = given.out / "preset.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"presets": presets}, indent=1) + "\n", encoding="utf-8")
    if as_json:
        emit({"presets": presets, "front": [_row(trial) for trial in found.front], "notes": notes})
    else:
        _show(found, metric, recall)
        for line in notes:
            note(line, "bold")
        note(f"chosen settings: {place}")
    raise typer.Exit(SOME_FAILED if notes or len(found.chosen) < len(recipes) else ALL_ANSWERED)


def _items(given: GridOptions, benchmark: str, questions: Path | None) -> tuple[Grid, Benchmark, str | None]:
    """The grid, its benchmark, and the split that the annotations say they hold."""
    from vlmfix.eval import benchmarks, tune
    from vlmfix.eval.drawn import TRUTH

    if questions is not None:
        from vlmfix.eval.questions import Questions

        made: Benchmark = Questions(questions)
        grid = given.grid("text")
        return replace(grid, images=grid.images or str(questions.parent)), made, None
    grid = given.grid(benchmark)
    options = grid.benchmarks[benchmark]
    source = options.get(TRUTH.get(benchmark, ""))
    return grid, benchmarks.load(benchmark, **options), tune.split_of(str(source)) if source else None


def _row(trial: Trial) -> dict[str, Any]:
    return {"recipe": trial.recipe, "hallucination": trial.loss, "recall": trial.recall, "ms_per_token": trial.cost}


def _show(found: Tuned, metric: str, recall: str) -> None:
    chosen = {trial.recipe for trial in found.chosen.values()}
    front = {trial.recipe for trial in found.front}
    cells = [
        (
            trial.recipe,
            f"{abs(trial.loss):.1f}",
            f"{trial.recall:.1f}",
            f"{trial.cost:.2f}",
            " ".join(word for word, here in (("front", front), ("chosen", chosen)) if trial.recipe in here),
        )
        for trial in [found.reference, *found.finalists]
    ]
    title = f"{found.n_candidates} candidates per method; those of the last round"
    show(table(["recipe", metric, recall, "ms/token", ""], cells, title))
