"""Many items through one model: batches that reuse each picture, and errors that stay with their item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmfix import pictures
from vlmfix.errors import PictureError, VlmfixError
from vlmfix.items import Fault, Item

if TYPE_CHECKING:
    from vlmfix.api import Answer, FixedVLM

Record = dict[str, Any]
_Batch = list[tuple[Item, list[Image.Image]]]


@dataclass(frozen=True)
class Seen:
    """Items of one picture (or one set of pictures), and the pictures."""

    items: Sequence[Item]
    images: list[Image.Image] = field(repr=False)


def answer_all(
    vlm: FixedVLM, items: Iterable[Item], *, batch_size: int = 8, seed: int | None = None, **generation: Any
) -> Iterator[list[Record]]:
    """Answers items, batch by batch.

    A batch holds different pictures; the prompts of the same pictures follow each other, so that the model, which
    remembers the encoding of the last picture batch, encodes every picture once.

    Args:
        vlm: the model with its recipe.
        items: what is asked.
        batch_size: items that are answered together.
        seed: seed of the draws, if the generation settings sample.
        **generation: settings of `FixedVLM.answer`.

    Yields:
        Records of the items that were just finished: id, image, prompt, recipe, text or error, tokens, seconds, report.

    Raises:
        VlmfixError: the model refuses the whole first batch, so that the recipe or the settings cannot work.
    """
    groups: dict[tuple[Path, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(item.images, []).append(item)
    waiting, begun = sorted(groups.values(), key=len, reverse=True), False
    for start in range(0, len(waiting), batch_size):
        chunk: list[Seen] = []
        failed: list[Record] = []
        for group in waiting[start : start + batch_size]:
            try:
                chunk.append(Seen(group, [pictures.load(path) for path in group[0].images]))
            except PictureError as error:
                failed += [error_record(item, str(vlm.recipe), error) for item in group]
        if failed:
            yield failed
        for turn in range(max((len(seen.items) for seen in chunk), default=0)):
            batch = [(seen.items[turn], seen.images) for seen in chunk if len(seen.items) > turn]
            records = _answer(vlm, batch, seed, generation)
            refused = [each for each in records if isinstance(each, VlmfixError)]
            if not begun and len(refused) == len(batch):
                raise refused[0]  # the recipe or the settings are at fault, not the items
            begun = True
            yield [
                error_record(item, str(vlm.recipe), each) if isinstance(each, VlmfixError) else each
                for (item, _), each in zip(batch, records, strict=True)
            ]


def error_record(item: Item | Fault, recipe: str, error: Exception | str) -> Record:
    """The record of an item that has no answer."""
    if isinstance(item, Fault):
        return _record(item.id, None, None, recipe, error=str(error))
    where = "" if item.where in str(error) else f"{item.where}: "
    return _record(item.id, _single(item.names), item.prompt, recipe, error=f"{where}{error}")


def _answer(vlm: FixedVLM, batch: _Batch, seed: int | None, generation: dict[str, Any]) -> list[Record | VlmfixError]:
    """Records of a batch, in two halves if it fails as a whole; a refusal stands in the place of a record."""
    items = [item for item, _ in batch]
    try:
        answers = vlm.answer(
            [_single(images) for _, images in batch],
            [item.prompt for item in items],
            seed=seed,
            ids=[item.id for item in items],
            details=True,
            **generation,
        )
    except Exception as error:  # whatever one item did to the model must not cost the others their answers
        failure = error.with_traceback(None)  # its frames hold the memory that the halves will need
    else:
        return [_answered(vlm, item, images, each) for (item, images), each in zip(batch, answers, strict=True)]
    if len(batch) > 1:
        half = len(batch) // 2
        return _answer(vlm, batch[:half], seed, generation) + _answer(vlm, batch[half:], seed, generation)
    return [failure if isinstance(failure, VlmfixError) else error_record(items[0], str(vlm.recipe), _reason(failure))]


def _answered(vlm: FixedVLM, item: Item, images: list[Image.Image], answer: Answer) -> Record:
    record = _record(item.id, _single(item.names), item.prompt, str(vlm.recipe), text=answer.text)
    report = {**answer.report, "pictures": len(images), **answer.evidence}
    record |= {"tokens": answer.tokens, "seconds": round(answer.seconds, 4), "report": report}
    notes = [note for image in images for note in pictures.notes(image)]
    return record | ({"notes": notes} if notes else {})


def _record(key: str, image: Any, prompt: str | None, recipe: str, **outcome: str) -> Record:
    head = {"id": key, "image": image, "prompt": prompt, "recipe": recipe, **outcome}
    return {**head, "tokens": None, "seconds": None, "report": None}


def _single(values: Sequence[Any]) -> Any:
    """The only value itself, None for no value."""
    return values[0] if len(values) == 1 else list(values) or None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if "out of memory" in text.lower():
        return f"out of memory ({text[:200]}); lower --max-new-tokens, scale the picture down, or use --quantize 4bit"
    return f"{type(error).__name__}: {text[:500]}"
