"""`vlmfix run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, note
from vlmfix.commands.options import GenerationOptions, Json, ModelOptions, parse_recipes
from vlmfix.commands.passes import Pass, answer_in_turn
from vlmfix.errors import UsageError
from vlmfix.items import collect

if TYPE_CHECKING:
    from vlmfix.answering import Record


def run(
    source: Annotated[Path, typer.Argument(help="A picture, a folder of pictures, or a .jsonl, .csv or .tsv file.")],
    model: ModelOptions,
    generation: GenerationOptions,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Asked of every picture; may hold {columns} of the file.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Recipe, as in 'var' or 'var+vcd(alpha=1)'; several with ';'.")
    ] = "greedy",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="JSONL file of answers, or an existing folder, in which every run writes a file of its own; what "
            "either holds already is kept, and only what is left is asked.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures answered together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again where --out holds an error.")] = False,
    as_json: Json = False,
) -> None:
    """Answer prompts about a picture, a folder of pictures or a prompt file.

    Prompts come from --prompt, from the columns `image` and `prompt` of a .jsonl, .csv or .tsv file (in a folder:
    prompts.jsonl, prompts.csv or prompts.tsv), or from name.txt beside name.jpg, one prompt a line. A --prompt may hold
    columns, as in "Is this a {title}?", or {name}, {stem} and {prompt} of a picture.

    Answers go to stdout, or with --out to a file: one JSON object a line, written as they come. A run that was stopped
    goes on where it stopped when the same command is given again. What cannot be answered becomes an error record.

    Exit code: 0 all answered, 1 some failed, 2 wrong usage.
    """
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty; write what is asked about every picture")
    recipes = parse_recipes(method)
    found = collect(source, prompt)
    for line in found.notes:
        note(f"note: {line}")
    if limit is not None:
        found.items = dict(list(found.items.items())[:limit])
    settings = generation.settings()
    passes = [Pass(recipe, found, out, {**model.spec(), **settings}, retry_errors) for recipe in recipes]
    show = None if out is not None else _as_json if as_json else _as_text
    answer_in_turn(passes, model, batch_size, settings, show)
    if out is not None and as_json:
        emit([each.summary() for each in passes])
    raise typer.Exit(SOME_FAILED if any(each.failed for each in passes) else ALL_ANSWERED)


def _as_json(records: list[Record]) -> None:
    for record in records:
        emit(record, indent=None)


def _as_text(records: list[Record]) -> None:
    for record in records:
        typer.echo(_readable(record))


def _readable(record: Record) -> str:
    image = record["image"]
    head = [", ".join(image) if isinstance(image, list) else image or record["id"], record["prompt"], record["recipe"]]
    text = record["text"] if "text" in record else f"ERROR: {record['error']}"
    return "\n".join([" | ".join(part for part in head if part), f"  {text}"])
