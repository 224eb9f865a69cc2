"""`vlmfix compare`."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from vlmfix.commands.console import ALL_ANSWERED, SOME_FAILED, emit, screen
from vlmfix.commands.options import GenerationOptions, Json, Methods, ModelOptions, parse_recipes, with_recipe
from vlmfix.errors import UsageError, VlmfixError

if TYPE_CHECKING:
    from vlmfix.api import FixedVLM
    from vlmfix.items import Item
    from vlmfix.recipe import Recipe

Change = Literal["same", "gone", "new"]
_STYLES = {"same": "", "gone": "red strike", "new": "bold green"}
_MARKS = {"same": ("", ""), "gone": ("[-", "-]"), "new": ("{+", "+}")}


def compare(
    image: Annotated[Path, typer.Argument(help="The picture.")],
    prompt: Annotated[str, typer.Argument(help="What is asked about it.")],
    model: ModelOptions,
    generation: GenerationOptions,
    methods: Methods = "greedy; var; vcd",
    as_json: Json = False,
) -> None:
    """Answer one prompt with several recipes; later answers show what changed against the first."""
    import vlmfix.pictures as pictures
    from vlmfix.items import Item

    if not prompt.strip():
        raise UsageError("the prompt is empty; write what is asked about the picture")
    recipes = parse_recipes(methods)
    pictures.load(image)  # a bad picture is told before the model is loaded
    item = Item(image.name, (image,), prompt, (str(image),), str(image))
    vlm = model.load()
    records = [_ask(vlm, recipe, item, generation.settings()) for recipe in recipes]
    first = next((record["text"] for record in records if "text" in record), "")
    for record in records:
        record["changes"] = changes(first, record.get("text", first))
    if as_json:
        emit(records)
    else:
        _show(records)
    raise typer.Exit(SOME_FAILED if any("error" in record for record in records) else ALL_ANSWERED)


def changes(before: str, after: str) -> list[tuple[Change, str]]:
    """The way from one text to another in runs of words."""
    old, new = before.split(), after.split()
    runs: list[tuple[Change, str]] = []
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            runs.append(("same", " ".join(old[i:j])))
            continue
        if i < j:
            runs.append(("gone", " ".join(old[i:j])))
        if k < m:
            runs.append(("new", " ".join(new[k:m])))
    return runs


def _ask(vlm: FixedVLM, recipe: Recipe, item: Item, settings: dict[str, Any]) -> dict[str, Any]:
    from vlmfix.answering import answer_all, error_record

    try:
        with with_recipe(vlm, recipe) as mitigated:
            return next(iter(answer_all(mitigated, [item], **settings)))[0]
    except VlmfixError as error:
        return error_record(item, str(recipe), error)


def _show(records: list[dict[str, Any]]) -> None:
    console = screen()
    coloured = console.is_terminal and not console.no_color
    for record in records:
        if "error" in record:
            console.print(Text.assemble((record["recipe"], "bold"), "  ", (f"error: {record['error']}", "red")))
            continue
        cost = f"  {record['tokens']} tokens, {record['seconds']:.2f} s"
        console.print(Text.assemble((record["recipe"], "bold"), (cost, "dim")))
        words = Text("  ")
        for kind, run in record["changes"]:
            start, end = ("", "") if coloured else _MARKS[kind]
            words.append(f"{start}{run}{end}", _STYLES[kind] if coloured else "").append(" ")
        console.print(words, soft_wrap=not coloured)
