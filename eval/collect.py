"""From the answers of a grid's runs to the rows of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import compare, foreign
from .base import Item, Score
from .baselines import Arm, derived
from .benchmarks import Benchmark
from .grid import Grid
from .guards import Record
from .runner import chosen
from .spec import Spec
from .suite import Run
from .world import wait


@dataclass(frozen=True)
class Answered:
    """Everything that one row of a table is made of.

    Args:
        name: of the row.
        kind: see `compare.Row`.
        answers: per seed, the records in the order of the items.
        specs: per seed, what was run; empty for derived and foreign rows.
        asked: the questions as this row asked them.
        grade: evidence grade.
        notes: failures and other things that a reader must know.
    """

    name: str
    kind: str
    answers: Sequence[Sequence[Record]]
    specs: Sequence[Spec]
    asked: Sequence[Item]
    grade: str = ""
    notes: Sequence[str] = ()


def collect(
    grid: Grid,
    benchmark: Benchmark,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    add: Mapping[str, Sequence[Record]] | None = None,
    patience: float = 1800.0,
) -> list[Answered]:
    """Answers of every row, in the order of the arms, foreign ones last; waits for other processes' answers.

    Args:
        grid: the grid.
        benchmark: the benchmark.
        arms: its rows.
        runs: what `suite.run` returned.
        add: name -> foreign records.
        patience: see `world.wait`.

    Raises:
        UsageError: for foreign answers to other questions.
    """
    plain = chosen(benchmark.items(), grid.limit)
    found: list[Answered] = []
    for arm in arms:
        if arm.derive:
            base = next(entry for entry in found if entry.kind == "reference")
            found.append(Answered(arm.name, arm.kind, [derived(arm, base.answers[0])], [], base.asked))
            continue
        answers, notes, mine = [], list[str](), [run for run in runs if run.arm.name == arm.name]
        for run in mine:
            wait(run.store, {item.id for item in plain}, patience)
            merged = run.store.read()
            answers.append([merged.answers[item.id] for item in plain if item.id in merged.answers])
            notes += merged.problems[:5]
            failed = [merged.errors[item.id] for item in plain if item.id in merged.errors]
            if failed:
                first = failed[0]
                notes.append(f"{len(failed)} items failed and are not scored, first {first['id']!r}: {first['error']}")
        questions = chosen(mine[0].items, grid.limit)
        specs = [run.spec for run in mine]
        found.append(Answered(arm.name, arm.kind, answers, specs, questions, mine[0].grade, notes))
    asked = next((entry.asked for entry in found if entry.kind == "reference"), plain)
    for name, records in (add or {}).items():
        taken, notes = foreign.checked(name, records, benchmark, asked)
        found.append(Answered(name, "foreign", [taken], [], asked, notes=notes))
    return found


def row(benchmark: Benchmark, answered: Answered) -> compare.Row:
    """The row of collected answers: every seed scored, problems told in the notes."""
    items = answered.asked
    whole = len(items) == len(benchmark.items())
    scores: list[Score] = [benchmark.score(records) for records in answered.answers]
    told = [line for score in scores for line in score.problems if whole or "items without an answer" not in line]
    by_id = [{str(record["id"]): record for record in records} for records in answered.answers]
    notes = list(dict.fromkeys([*answered.notes, *told]))
    return compare.row(answered.name, items, by_id, scores, answered.kind, answered.grade, notes)
