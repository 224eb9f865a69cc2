"""`vlmfix run`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import ALL_ANSWERED, INTERRUPTED, SOME_FAILED, emit, fail, note
from vlmfix.commands.options import GenerationOptions, Json, ModelOptions, parse_recipes, with_recipe
from vlmfix.commands.progress import Progress
from vlmfix.errors import VlmfixError
from vlmfix.items import Items, collect

if TYPE_CHECKING:
    from vlmfix.answering import Record
    from vlmfix.api import FixedVLM
    from vlmfix.eval.store import Store
    from vlmfix.recipe import Recipe


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
        Path | None, typer.Option("--out", "-o", help="JSONL file of answers; a run that was stopped goes on in it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures answered together.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again where --out holds an error.")] = False,
    as_json: Json = False,
) -> None:
    """Answers prompts about pictures."""
    recipes = parse_recipes(method)
    found = collect(source, prompt)
    for line in found.notes:
        note(f"note: {line}")
    if limit is not None:
        found.items = dict(list(found.items.items())[:limit])
    settings = generation.settings()
    todo = [_Pass(recipe, found, out, {**model.spec(), **settings}, retry_errors) for recipe in recipes]
    vlm = model.load() if any(each.items for each in todo) else None
    if vlm is not None:
        for each in todo:
            with_recipe(vlm, each.recipe).close()  # a refusal comes before the first answer
    for each in todo:
        each.answer(vlm, batch_size, settings, as_json)
    if out is not None and as_json:
        emit([each.summary() for each in todo])
    raise typer.Exit(SOME_FAILED if any(each.failed for each in todo) else ALL_ANSWERED)


class _Pass:
    """One recipe over all items."""

    def __init__(self, recipe: Recipe, found: Items, out: Path | None, settings: dict[str, Any], retry: bool) -> None:
        self.recipe, self.out = recipe, out
        self.items, self.faults = list(found.items.values()), found.faults
        self.answered = self.failed = self.kept = 0
        self.seconds = 0.0
        self.store: Store | None = None
        if out is not None:
            from vlmfix.commands.answers import left_to_do, open_store
            from vlmfix.eval.spec import digest

            self.store = open_store(out, digest({"recipe": recipe.hash, **settings}), retry_errors=retry)
            left = left_to_do(self.store, found, retry_errors=retry)
            self.items, self.faults, self.failed = left.items, left.faults, left.failed
            self.kept = left.answered + left.failed

    def answer(self, vlm: FixedVLM | None, batch_size: int, settings: dict[str, Any], as_json: bool) -> None:
        """Asks what has no record yet."""
        if self.kept:
            again = f", {self.failed} of them errors; --retry-errors asks those again" if self.failed else ""
            note(f"{self.recipe}: {self.kept} items have their record in {self.out} already{again}")
        try:
            with Progress(str(self.recipe), len(self.items) + len(self.faults)) as progress:
                for records in self._records(vlm, batch_size, settings):
                    failed = sum("error" in record for record in records)
                    self._keep(records, as_json)
                    self.failed += failed
                    self.answered += len(records) - failed
                    progress.add(len(records), failed)
        except KeyboardInterrupt:
            goes_on = "; the same command goes on from here" if self.out else ""
            note(f"stopped after {self.answered} answers{goes_on}", "bold")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            self.seconds = progress.seconds
            if self.store is not None:
                self.store.close()
        where = f" in {self.out}" if self.out else ""
        note(f"{self.recipe}: {self.answered} answered, {self.failed} failed, {self.seconds:.1f} s{where}", "bold")

    def _records(self, vlm: FixedVLM | None, batch_size: int, settings: dict[str, Any]) -> Iterator[list[Record]]:
        from vlmfix.answering import answer_all, error_record

        if self.faults:
            yield [error_record(fault, str(self.recipe), fault.error) for fault in self.faults]
        if vlm is not None and self.items:
            with with_recipe(vlm, self.recipe) as mitigated:
                yield from answer_all(mitigated, self.items, batch_size=batch_size, **settings)

    def _keep(self, records: list[Record], as_json: bool) -> None:
        if self.store is not None:
            try:
                self.store.extend(records)
            except VlmfixError as error:
                raise typer.Exit(fail(error, SOME_FAILED)) from error
        elif as_json:
            for record in records:
                emit(record, indent=None)
        else:
            for record in records:
                typer.echo(_readable(record))

    def summary(self) -> dict[str, Any]:
        """Counts of this pass."""
        return {
            "recipe": str(self.recipe),
            "answered": self.answered,
            "failed": self.failed,
            "kept": self.kept,
            "seconds": round(self.seconds, 3),
            "out": str(self.out),
        }


def _readable(record: Record) -> str:
    image = record["image"]
    head = [", ".join(image) if isinstance(image, list) else image or record["id"], record["prompt"], record["recipe"]]
    text = record["text"] if "text" in record else f"ERROR: {record['error']}"
    return "\n".join([" | ".join(part for part in head if part), f"  {text}"])
