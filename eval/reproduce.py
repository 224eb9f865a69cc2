"""Published tables as recipes: what to run, what was published, and which figures would count as reproduced.

The acceptance intervals were declared before any run of this project on these checkpoints. They say how far another
implementation may be off by chance: for CHAIR, the 95 % bootstrap intervals over pictures of the authors' own logged
answers; for POPE, 2 points, where the same interval of logged LLaVA-1.5 answers has a half-width of 1.2 (F1, random).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, nearest
from .baselines import SAMPLING, Arm
from .benchmarks.files import DATA
from .compare import Comparison
from .grid import Grid


@dataclass(frozen=True)
class Expected:
    """A published figure.

    Args:
        metric: of the benchmark.
        published: as printed; None where only the interval is known.
        low: lower end of what counts as reproduced.
        high: upper end.
    """

    metric: str
    published: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A row of a published table: how it is run, and its figures."""

    arm: Arm
    expected: Sequence[Expected]


@dataclass(frozen=True)
class Reproduction:
    """A published table.

    Args:
        title: what it is.
        source: where the figures are printed, and where the intervals come from.
        model: checkpoint on the Hub.
        benchmark: name.
        options: of the benchmark.
        needs: options that the user must give, with what they are.
        items: number of items of the whole run.
        rows: greedy first.
        protocol: picture protocol.
        seeds: of sampled rows.
        generation: settings of all rows.
        notes: known traps.
    """

    title: str
    source: str
    model: str
    benchmark: str
    options: Mapping[str, Any]
    needs: Mapping[str, str]
    items: int
    rows: Sequence[Row]
    protocol: str = "paper"
    seeds: Sequence[int] = (0,)
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """One figure of a reproduction.

    Args:
        row: name of the row.
        expected: the published figure.
        value: what came out; None if the row or metric is missing.
        verdict: `reproduced`, `outside`, or `not comparable` with the reason.
    """

    row: str
    expected: Expected
    value: float | None
    verdict: str


def _pope(around: float, **splits: tuple[float, float]) -> list[Expected]:
    """Accuracy and F1 of each split, with the same room around each."""
    return [
        Expected(f"{split}/{metric}", value, round(value - around, 2), round(value + around, 2))
        for split, values in splits.items()
        for metric, value in zip(("accuracy", "f1"), values, strict=True)
    ]


_LLAVA = "llava-hf/llava-1.5-7b-hf"
_COCO = {"truth": "folder with COCO's instances_val2014.json and captions_val2014.json, or the instances file"}

RECIPES: Mapping[str, Reproduction] = {
    "chair-llava15-opera": Reproduction(
        title="CHAIR, LLaVA-1.5-7B, 500 pictures, 512 new tokens: greedy and beam rows of OPERA's table",
        source="OPERA, arXiv 2311.17911; intervals from its logs greedy.jsonl and beam5.jsonl (commit 61426ef)",
        model=_LLAVA,
        benchmark="chair",
        options={"prompt": "opera", "scorer": "standalone", "ids": str(DATA / "opera_pictures.txt")},
        needs=_COCO,
        items=500,
        rows=(
            Row(
                Arm("greedy", "reference"),
                (
                    Expected("chair_s", 45.0, 40.8, 49.4),
                    Expected("chair_i", 14.7, 11.3, 14.4),
                    Expected("recall", None, 77.7, 81.8),
                    Expected("length", None, 84.6, 88.2),
                ),
            ),
            Row(
                Arm("beam 5", "baseline", settings={"num_beams": 5}),
                (
                    Expected("chair_s", 48.8, 44.6, 53.4),
                    Expected("chair_i", 13.9, 12.3, 15.5),
                    Expected("recall", None, 77.4, 81.7),
                    Expected("length", None, 83.7, 87.4),
                ),
            ),
        ),
        generation={"max_new_tokens": 512},
        notes=(
            "CHAIR_i of the greedy row is printed as 14.7, but the authors' own log scores 12.8, with CHAIR_s as "
            "printed; the interval is that of the log",
        ),
    ),
    "pope-llava15": Reproduction(
        title="POPE on COCO, LLaVA-1.5-7B, greedy: the figure of its paper",
        source="LLaVA-1.5, arXiv 2310.03744: mean F1 of the three splits",
        model=_LLAVA,
        benchmark="pope",
        options={"splits": "random,popular,adversarial", "parser": "official"},
        needs={},
        items=5127,
        rows=(Row(Arm("greedy", "reference"), (Expected("f1", 85.9, 83.9, 87.9),)),),
        notes=("the paper used the older random file of 2,910 questions; the file here has 3,000",),
    ),
    "pope-llava15-vcd": Reproduction(
        title="POPE on COCO, LLaVA-1.5-7B: sampling and VCD rows of VCD's table",
        source="VCD, arXiv 2311.16922, README table, mean over 5 runs",
        model=_LLAVA,
        benchmark="pope",
        options={
            "splits": "random,popular,adversarial",
            "parser": "vcd",
            "suffix": " Please answer this question with one word.",
        },
        needs={},
        items=5127,
        rows=(
            Row(Arm("greedy", "reference"), ()),
            Row(
                Arm("sampling", "control", settings=SAMPLING),
                _pope(2.0, random=(83.29, 81.33), popular=(81.88, 80.06), adversarial=(78.96, 77.57)),
            ),
            Row(
                Arm("sampling + mask", "control", "vcd(alpha=0, beta=0.2)", settings=SAMPLING),
                (),
            ),
            Row(
                Arm("vcd", "method", "vcd(alpha=1, beta=0.2, noise_step=500)", settings=SAMPLING),
                _pope(2.0, random=(87.73, 87.16), popular=(85.38, 85.06), adversarial=(80.88, 81.33)),
            ),
        ),
        seeds=(0, 1, 2, 3, 4),
        notes=(
            "the rows compare sampling with sampling; greedy and the mask alone (alpha 0) stand beside them, since "
            "much of the published gain is theirs (arXiv 2504.10020)",
            "users report that they could not reproduce the VCD rows (DAMO-NLP-SG/VCD issues 5 and 24)",
        ),
    ),
}
"""Name -> published table."""


def find(name: str) -> Reproduction:
    """A published table by name.

    Raises:
        UsageError: for an unknown name, with the nearest one.
    """
    if name not in RECIPES:
        raise UsageError(f"no reproduction is called {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]


def grid(
    recipe: Reproduction, model: str | None = None, images: str = "", limit: int | None = None, **given: Any
) -> Grid:
    """The grid that runs a published table.

    Args:
        recipe: what `find` returned.
        model: another checkpoint than the published one.
        images: folder of the pictures.
        limit: only the first items; nothing is judged then.
        given: options that the recipe needs, and others of the benchmark; `batch_size`, `protocol`, `load` of the grid.

    Raises:
        UsageError: if a needed option is missing.
    """
    own = {key: given.pop(key) for key in ("batch_size", "protocol", "load") if key in given}
    for key, meaning in recipe.needs.items():
        if not given.get(key):
            raise UsageError(f"{recipe.title}: give --{key}, {meaning}")
    return Grid(
        benchmarks={recipe.benchmark: {**recipe.options, **given}},
        model=model or recipe.model,
        images=images,
        seeds=recipe.seeds,
        limit=limit,
        generation=recipe.generation,
        **{"protocol": recipe.protocol, **own},
    )


def arms(recipe: Reproduction) -> list[Arm]:
    """The rows to run."""
    return [row.arm for row in recipe.rows]


def judge(recipe: Reproduction, comparison: Comparison) -> list[Outcome]:
    """Every published figure beside what came out.

    Args:
        recipe: what `find` returned.
        comparison: of its run.
    """
    lines = {line.name: line for line in comparison.lines}
    whole = comparison.items == recipe.items
    outcomes = []
    for row in recipe.rows:
        for expected in row.expected:
            cell = lines[row.arm.name].cells.get(expected.metric) if row.arm.name in lines else None
            value = cell.value if cell else None
            if value is None or value != value:
                verdict = "not comparable: missing"
            elif not whole:
                verdict = f"not comparable: {comparison.items} of {recipe.items} items"
            else:
                verdict = "reproduced" if expected.low <= value <= expected.high else "outside"
            outcomes.append(Outcome(row.arm.name, expected, value, verdict))
    return outcomes


def markdown(recipe: Reproduction, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table with source and notes."""
    lines = [f"**{recipe.title}**", "", "| row | figure | published | counts as reproduced | here | verdict |"]
    lines.append("|---|---|---:|---|---:|---|")
    for one in outcomes:
        published = "" if one.expected.published is None else f"{one.expected.published:g}"
        value = "" if one.value is None else f"{one.value:.1f}"
        room = f"{one.expected.low:g} to {one.expected.high:g}"
        lines.append(f"| {one.row} | {one.expected.metric} | {published} | {room} | {value} | {one.verdict} |")
    return "\n".join([*lines, "", f"- {recipe.source}", *(f"- {note}" for note in recipe.notes)]) + "\n"
