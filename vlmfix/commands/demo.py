"""`vlmfix demo`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note, screen, show, table
from vlmfix.commands.options import GenerationOptions, Json, Methods, ModelOptions, parse_recipes
from vlmfix.commands.passes import Pass, answer_in_turn
from vlmfix.items import Item, Items

if TYPE_CHECKING:
    from vlmfix.eval.base import Item as Question
    from vlmfix.eval.benchmarks.chair import Chair
    from vlmfix.eval.benchmarks.pope import Pope

EXAMPLES = Path(__file__).parents[2] / "examples" / "scenes"
"""Pictures of a checkout; elsewhere they are drawn anew."""

PICTURES = 24
FIGURES = {
    "chair_s": "captions with an invented object %",
    "chair_i": "invented among mentioned objects %",
    "recall": "objects mentioned %",
    "length": "words",
}
"""Figures of CHAIR that the summary shows."""


def demo(
    model: ModelOptions,
    methods: Methods = "greedy; var; vcd",
    scenes: Annotated[Path | None, typer.Option(help="Folder with images/ and instances.json in COCO format.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the answers.")] = Path("demo"),
    shown: Annotated[int, typer.Option("--show", min=0, help="Pictures whose captions are printed.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures answered together.")] = 8,
    as_json: Json = False,
) -> None:
    """Caption drawn scenes and answer yes/no questions about them, per recipe, with invented objects marked."""
    from vlmfix.eval.benchmarks.chair import Chair
    from vlmfix.eval.benchmarks.pope import Pope

    recipes = parse_recipes(methods)
    folder = scenes or _examples(out)
    captions = Chair(truth=folder)
    questions = Pope(coco=folder, splits=("adversarial",), pictures=PICTURES, per_picture=1)
    found = Items(items={item.id: _item(item, folder) for item in [*captions.items(), *questions.items()]})
    answers = out / "answers.jsonl"
    answers.unlink(missing_ok=True)
    settings = GenerationOptions(max_new_tokens=128).settings()
    passes = [Pass(recipe, found, answers, {**model.spec(), **settings}, retry=False) for recipe in recipes]
    answer_in_turn(passes, model, batch_size, settings)
    records: dict[str, list[dict[str, Any]]] = {str(recipe): [] for recipe in recipes}
    for line in answers.read_text("utf-8").splitlines():
        record = json.loads(line)
        records[record["recipe"]].append(record)
    rows = {name: _score(captions, questions, kept) for name, kept in records.items()}
    if as_json:
        figures = {
            name: {k: None if math.isnan(v) else v for k, v in row.figures.items()} for name, row in rows.items()
        }
        emit({"answers": str(answers), "recipes": figures})
    else:
        _show_captions(rows, list(captions.items())[:shown])
        show(_summary(rows, len(captions.items()), len(questions.items())))
        note(f"All answers: {answers}. So few pictures show how it works, not which method is better.")
    raise typer.Exit(SOME_FAILED if any(each.failed for each in passes) else ALL_ANSWERED)


@dataclass(frozen=True)
class Row:
    """A recipe's answers: figures, and per picture the caption with its mentions of objects."""

    figures: dict[str, float]
    captions: dict[str, tuple[str, list[dict[str, Any]]]]


def _examples(out: Path) -> Path:
    if (EXAMPLES / "instances.json").is_file():
        return EXAMPLES
    from vlmfix.eval import scenes

    return scenes.build(out / "scenes", n=PICTURES, split="demo")


def _item(question: Question, folder: Path) -> Item:
    within = Path("images") / question.image
    name = within if (folder / within).is_file() else Path(question.image)
    return Item(question.id, (folder / name,), question.prompt, (name.as_posix(),), name.as_posix())


def _score(captions: Chair, questions: Pope, records: list[dict[str, Any]]) -> Row:
    told = {item.id for item in captions.items()}
    good = [record for record in records if "text" in record]
    described = captions.score([record for record in good if record["id"] in told])
    answered = questions.score([record for record in good if record["id"] not in told])
    chair, pope = described.figures(), answered.figures()
    figures = {name: chair[name] for name in FIGURES}
    figures |= {"accuracy": pope["accuracy"], "yes_ratio": pope["yes_ratio"]}
    figures["seconds_per_answer"] = sum(record["seconds"] for record in good) / max(len(good), 1)
    figures["tokens_per_second"] = sum(r["tokens"] for r in good) / max(sum(r["seconds"] for r in good), 1e-9)
    texts = {record["id"]: record["text"] for record in good}
    spans = {key: (texts[key], detail["spans"]) for key, detail in described.details.items() if key in texts}
    return Row(figures, spans)


def _show_captions(rows: Mapping[str, Row], pictures: Sequence[Question]) -> None:
    console = screen()
    coloured = console.is_terminal and not console.no_color
    key = Text.assemble("Objects ", ("in the picture", "green"), " and ", ("invented", "bold red"))
    console.print(key if coloured else "Captions; !objects! are not in the picture.")
    for picture in pictures:
        console.print(Text(f"\n{picture.image}: {', '.join(picture.truth['objects'])}", "bold"), soft_wrap=not coloured)
        for name, row in rows.items():
            if picture.id in row.captions:
                text = marked(*row.captions[picture.id], coloured)
                console.print(Text.assemble((f"  {name:12} ", "dim"), text), soft_wrap=not coloured)
    console.print()


def marked(text: str, spans: Sequence[Mapping[str, Any]], coloured: bool) -> Text:
    """The caption with its objects marked: by colour, or invented ones by exclamation marks."""
    result, at = Text(), 0
    for span in spans:
        result.append(text[at : span["start"]])
        word, invented = text[span["start"] : span["end"]], span["hallucinated"]
        style = "bold red" if invented else "green"
        result.append(f"!{word}!" if invented and not coloured else word, style if coloured else "")
        at = span["end"]
    return result.append(text[at:])


def _summary(rows: Mapping[str, Row], captions: int, questions: int) -> Table:
    columns = ["recipe", *FIGURES.values(), "yes/no right %", "yes %", "s/answer"]
    names = [*FIGURES, "accuracy", "yes_ratio"]
    cells = (
        [name, *(_figure(row.figures[figure]) for figure in names), f"{row.figures['seconds_per_answer']:.3f}"]
        for name, row in rows.items()
    )
    return table(columns, cells, f"{captions} captions, {questions} yes/no questions")


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
