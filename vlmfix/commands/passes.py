"""One recipe after the other over the same items, with progress, records and a place to go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vlmfix.commands.acting import Acting
from vlmfix.commands.console import INTERRUPTED, SOME_FAILED, fail, note
from vlmfix.commands.options import ModelOptions, with_recipe
from vlmfix.commands.progress import Progress
from vlmfix.errors import VlmfixError
from vlmfix.items import Items

if TYPE_CHECKING:
    from vlmfix.answering import Record
    from vlmfix.api import FixedVLM
    from vlmfix.eval.store import Store
    from vlmfix.recipe import Recipe

Show = Callable[[list["Record"]], None]


class Pass:
    """One recipe over all items of a source, into a file of answers if one is given.

    Args:
        recipe: the recipe.
        found: items and faults.
        out: answers file or folder; None to keep no record.
        settings: whatever else decides the answers, for the key of the run.
        retry: whether items that failed before are asked again.
    """

    def __init__(self, recipe: Recipe, found: Items, out: Path | None, settings: dict[str, Any], retry: bool) -> None:
        self.recipe, self.out = recipe, out
        self.items, self.faults = list(found.items.values()), found.faults
        self.answered = self.failed = self.kept = 0
        self.seconds = 0.0
        self.acting = Acting()
        self.store: Store | None = None
        if out is not None:
            from vlmfix.commands.answers import left_to_do, open_store
            from vlmfix.eval.spec import digest

            self.store = open_store(out, digest({"recipe": recipe.hash, **settings}), retry_errors=retry)
            left = left_to_do(self.store, found, retry_errors=retry)
            self.items, self.faults, self.failed = left.items, left.faults, left.failed
            self.kept = left.answered + left.failed

    def answer(self, vlm: FixedVLM | None, batch_size: int, settings: dict[str, Any], show: Show | None = None) -> None:
        """Asks what has no record yet.

        Args:
            vlm: the model; None if there are only faults to record.
            batch_size: pictures that are answered together.
            settings: settings of `FixedVLM.answer`.
            show: receives the records as they come.
        """
        if self.kept:
            again = f", {self.failed} of them errors; --retry-errors asks those again" if self.failed else ""
            note(f"{self.recipe}: {self.kept} items have their record in {self.out} already{again}")
        try:
            with Progress(str(self.recipe), len(self.items) + len(self.faults)) as progress:
                for records in self._records(vlm, batch_size, settings):
                    failed = sum("error" in record for record in records)
                    self._keep(records, show)
                    self.acting.add(records)
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
        where = f" in {self.store.written}" if self.store is not None else ""
        note(f"{self.recipe}: {self.answered} answered, {self.failed} failed, {self.seconds:.1f} s{where}", "bold")
        for line in self.acting.lines():
            note(f"  {line}")

    def _records(self, vlm: FixedVLM | None, batch_size: int, settings: dict[str, Any]) -> Iterator[list[Record]]:
        from vlmfix.answering import answer_all, error_record

        if self.faults:
            yield [error_record(fault, str(self.recipe), fault.error) for fault in self.faults]
        if vlm is not None and self.items:
            with with_recipe(vlm, self.recipe) as mitigated:
                yield from answer_all(mitigated, self.items, batch_size=batch_size, **settings)

    def _keep(self, records: list[Record], show: Show | None) -> None:
        if self.store is not None:
            try:
                self.store.extend(records)
            except VlmfixError as error:
                raise typer.Exit(fail(error, SOME_FAILED)) from error
        if show is not None:
            show(records)

    def summary(self) -> dict[str, Any]:
        """Counts of this pass."""
        return {
            "recipe": str(self.recipe),
            "answered": self.answered,
            "failed": self.failed,
            "kept": self.kept,
            "seconds": round(self.seconds, 3),
            "out": str(self.store.written if self.store is not None else self.out),
        }


def answer_in_turn(
    passes: Sequence[Pass], model: ModelOptions, batch_size: int, settings: dict[str, Any], show: Show | None = None
) -> None:
    """Loads the model if anything is left to do, and runs the passes; see `Pass.answer`.

    Raises:
        Refusal: a recipe cannot act on this model; nothing was answered then.
    """
    vlm = model.load() if any(each.items for each in passes) else None
    if vlm is not None:
        for each in passes:
            with_recipe(vlm, each.recipe).close()
    for each in passes:
        each.answer(vlm, batch_size, settings, show)
