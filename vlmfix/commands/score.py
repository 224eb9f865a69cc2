"""`vlmfix score`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note, show, table
from vlmfix.commands.grids import Option, with_options
from vlmfix.commands.options import Json
from vlmfix.errors import UsageError

if TYPE_CHECKING:
    from vlmfix.eval.base import Score

SHOWN = 5
"""Names printed of each kind of problem."""


def score(
    file: Annotated[Path, typer.Argument(help="Answers: of vlmfix, OPERA, PAI, LLaVA or lmms-eval.")],
    benchmark: Annotated[str, typer.Option("--benchmark", "-b", help="chair, pope, amber, mme, vqa, text, ...")],
    truth: Annotated[
        str | None, typer.Option(help="Annotations: a folder or file in COCO's format, or scenes[:SPLIT[:PICTURES]].")
    ] = None,
    option: Option = None,
    format: Annotated[str, typer.Option(help="Format of the file; found out by default.")] = "auto",
    variants: Annotated[
        bool, typer.Option("--variants", help="Print the variants of parsers and scorers too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a file of answers; needs neither model nor GPU.

    Answers of several recipes in one file are scored recipe by recipe. Everything that is not scored as usual is named:
    malformed lines, unknown and repeated ids, missing, empty, unparsed answers.

    Exit code: 0 scored, 1 scored with answers missing or broken, 2 wrong usage.
    """
    from vlmfix.eval import benchmarks, stats
    from vlmfix.eval.benchmarks.files import Problems
    from vlmfix.eval.importers import read_answers

    options = with_options({benchmark: _truth(benchmark, truth)}, option)[benchmark]
    made, reading = benchmarks.load(benchmark, **options), Problems()
    records = read_answers(file, reading, format)
    results: list[dict[str, Any]] = []
    for recipe, answers in _by_recipe(records).items():
        problems = Problems()
        found = made.score(answers, problems)
        results.append(
            {
                "recipe": recipe,
                "items": len(found.ids),
                "pictures": len(set(found.clusters)),
                "figures": {name: vars(one) for name, one in _intervals(found, stats.interval).items()},
                "problems": {**reading.kinds, **problems.kinds},
            }
        )
    if as_json:
        emit({"benchmark": made.label, "results": _finite(results)})
    else:
        for result in results:
            _show(made.label, result, variants)
    raise typer.Exit(SOME_FAILED if any(map(_incomplete, results)) else ALL_ANSWERED)


def _truth(benchmark: str, truth: str | None) -> dict[str, Any]:
    """The option that holds a benchmark's annotations."""
    if truth is None:
        return {}
    from vlmfix.eval import drawn

    if benchmark not in drawn.TRUTH:
        raise UsageError(f"--truth: {benchmark} takes no COCO annotations; give its own options with --option")
    scenes = drawn.parse(truth)
    found: dict[str, Any] = {drawn.TRUTH[benchmark]: str(drawn.folder(scenes)) if scenes else truth}
    return found | ({"pictures": scenes.pictures} if scenes and benchmark == "pope" else {})


def _by_recipe(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(str(record.get("recipe") or ""), []).append(record)
    return found or {"": []}


def _intervals(score: Score, interval: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = interval(score)
    return found


def _incomplete(result: dict[str, Any]) -> bool:
    """Whether some answer is missing or broken; notes on what is usual do not count."""
    grave = ("items without an answer", "errors", "records without", "answers whose id", "malformed", "repeated")
    return any(kind.startswith(grave) or "line" in kind for kind in result["problems"])


def _show(label: str, result: dict[str, Any], variants: bool) -> None:
    cells = [
        (name, _figure(one["value"]), f"{_figure(one['low'])} to {_figure(one['high'])}")
        for name, one in result["figures"].items()
        if variants or "[" not in name
    ]
    about = f"{result['items']} items on {result['pictures']} pictures"
    title = f"{label}: {result['recipe']}, {about}" if result["recipe"] else f"{label}: {about}"
    show(table(["figure", "value", "95 % interval over pictures"], cells, title))
    for kind, names in result["problems"].items():
        more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        note(f"{len(names)} {kind}: {', '.join(map(str, names[:SHOWN]))}{more}")


def _figure(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value
