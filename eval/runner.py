"""Questions through a model: batches, errors that stay with their item, a store that remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import UsageError, VlmfixError
from .base import Item
from .store import Record, Store
from .world import World, shard, world

GIVE_UP = 16
"""So many items in a row that fail with one and the same message end a run: the model is broken, not the items."""


class GaveUp(VlmfixError):  # noqa: N818 - it says what the run did
    """So many items failed alike that the recipe, not the items, must be at fault."""


Pictures = Callable[[str], Any]
"""Picture name of an item -> what the answerer takes (a PIL image, a path)."""


class Answerer(Protocol):
    """What the runner needs of a model."""

    def answer(self, items: Sequence[Item], images: Sequence[Any], settings: Mapping[str, Any]) -> list[Record]:
        """Answers a batch.

        Args:
            items: what is asked; the questions about one picture stand next to each other.
            images: the picture of each item, None for none; the same object for the same picture.
            settings: generation settings, the same for the whole run.

        Returns:
            One record per item, in order: `id` and `text` (or `error`); optional `tokens`, `seconds` (an item's share
            of its batch), `prefill_seconds`, `extra_rows`, `peak_bytes` (over the weights), `margin`, `report`.
        """
        ...


@dataclass(frozen=True)
class Outcome:
    """How a run went in this process.

    Args:
        answered: items answered now.
        failed: items that failed now.
        kept: items that had a record before.
        seconds: time taken.
    """

    answered: int
    failed: int
    kept: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Args:
        items: items without a record.
        seconds_per_item: measured on a few warmed items, one process.
        hours: for all of them, divided over the processes.
        peak_mib: highest memory over the weights seen, None if not recorded.
        sampled: items answered for it.
    """

    items: int
    seconds_per_item: float
    hours: float
    peak_mib: float | None
    sampled: int


def evaluate(
    items: Sequence[Item],
    answerer: Answerer,
    store: Store,
    *,
    pictures: Pictures | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    retry_errors: bool = False,
    within: World | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Answers this process's share of the items that have no record yet.

    Batches hold questions of similar length. A batch that fails is asked again item by item, and an item that fails
    becomes an error record.

    Args:
        items: the benchmark's items.
        answerer: the model.
        store: takes a record per item.
        pictures: opens a picture; by default its name is handed on. Items without a picture get None.
        settings: generation settings.
        batch_size: items answered together.
        limit: only the first items.
        retry_errors: whether items with an error record are asked again.
        within: this process among all; found out by default.
        progress: called with done and all items of this process after every batch.

    Raises:
        GaveUp: if many items in a row fail alike.
        VlmfixError: if the answerer breaks its contract or the disk is full.
    """
    started, settings = time.perf_counter(), dict(settings or {})
    mine = shard(chosen(items, limit), within or world())
    done = store.done(retry_errors)
    todo = [item for item in mine if item.id not in done]
    failures, answered = _Failures(), 0
    for number, batch in enumerate(batches(todo, batch_size), 1):
        records = _answer(answerer, batch, _opened(batch, pictures), settings)
        store.extend(records)
        answered += sum("text" in record for record in records)
        failures.see(records)
        if progress:
            progress(len(mine) - len(todo) + min(number * batch_size, len(todo)), len(mine))
    return Outcome(answered, len(todo) - answered, len(mine) - len(todo), time.perf_counter() - started)


def estimate(
    items: Sequence[Item],
    answerer: Answerer,
    *,
    pictures: Pictures | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    done: Iterable[str] = (),
    processes: int = 1,
    rounds: int = 2,
) -> Estimate:
    """Times a few batches, spread over short and long questions, after one that warms up; nothing is stored.

    Args:
        items: the benchmark's items.
        answerer: the model.
        pictures: as in `evaluate`.
        settings: as in `evaluate`.
        batch_size: as in `evaluate`.
        limit: as in `evaluate`.
        done: ids that have a record.
        processes: over which the run would be divided.
        rounds: timed batches.

    Raises:
        Exception: whatever the answerer raises; an estimate does not hide it.
    """
    known = set(done)
    todo = [item for item in chosen(items, limit) if item.id not in known]
    planned = list(batches(todo, batch_size))
    if not planned:
        return Estimate(0, 0.0, 0.0, None, 0)
    picked = [planned[place * (len(planned) - 1) // max(rounds - 1, 1)] for place in range(min(rounds, len(planned)))]
    records: list[Record] = []
    answerer.answer(planned[0], _images(planned[0], pictures), settings or {})
    started = time.perf_counter()
    for batch in picked:
        records += answerer.answer(batch, _images(batch, pictures), settings or {})
    each = (time.perf_counter() - started) / sum(map(len, picked))
    peaks = [record["peak_bytes"] for record in records if record.get("peak_bytes") is not None]
    hours = each * len(todo) / processes / 3600
    return Estimate(len(todo), each, hours, max(peaks) / 2**20 if peaks else None, sum(map(len, picked)))


def chosen(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first items.

    Raises:
        UsageError: for a limit below 1 or an id that occurs twice.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: give a number from 1 on")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UsageError(f"the benchmark has two items {item.id!r}; ids must be unique")
        seen.add(item.id)
    return list(items[:limit])


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items in batches of similar prompt length, the questions about one picture next to each other.

    Raises:
        UsageError: for a size below 1.
    """
    if size < 1:
        raise UsageError(f"--batch-size {size}: give a number from 1 on")
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.image or item.id, []).append(item)
    ordered = sorted(groups.values(), key=lambda group: max(len(item.prompt) for item in group))
    flat = [item for group in ordered for item in group]
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


class _Failures:
    """Counts equal errors in a row."""

    def __init__(self) -> None:
        self.message, self.count = "", 0

    def see(self, records: Iterable[Record]) -> None:
        for record in records:
            message = record.get("error", "")
            self.count = self.count + 1 if message and message == self.message else int(bool(message))
            self.message = message
        if self.count >= GIVE_UP:
            raise GaveUp(
                f"{self.count} items in a row failed with: {self.message}; mend it and start again with --retry-errors"
            )


def _images(batch: Sequence[Item], pictures: Pictures | None) -> list[Any]:
    found = _opened(batch, pictures)
    for image in found:
        if isinstance(image, Exception):
            raise image
    return found


def _opened(batch: Sequence[Item], pictures: Pictures | None) -> list[Any]:
    """Pictures of a batch, each opened once; an exception in place of one that cannot be read."""
    opened: dict[str, Any] = {}
    for item in batch:
        if item.image and item.image not in opened:
            try:
                opened[item.image] = pictures(item.image) if pictures else item.image
            except Exception as error:
                opened[item.image] = error
    return [opened.get(item.image) for item in batch]


def _answer(
    answerer: Answerer, batch: Sequence[Item], images: Sequence[Any], settings: Mapping[str, Any]
) -> list[Record]:
    good = [(item, image) for item, image in zip(batch, images, strict=True) if not isinstance(image, Exception)]
    found = {
        item.id: _error(item, image) for item, image in zip(batch, images, strict=True) if isinstance(image, Exception)
    }
    if good:
        found |= {record["id"]: record for record in _asked(answerer, good, settings)}
    return [found[item.id] for item in batch]


def _asked(answerer: Answerer, pairs: Sequence[tuple[Item, Any]], settings: Mapping[str, Any]) -> list[Record]:
    items = [item for item, _ in pairs]
    try:
        records = answerer.answer(items, [image for _, image in pairs], settings)
    except Exception as error:  # one item must not cost the others their answers
        if len(pairs) == 1:
            return [_error(items[0], error)]
        return [record for pair in pairs for record in _asked(answerer, [pair], settings)]
    if [record.get("id") for record in records] != [item.id for item in items]:
        raise VlmfixError(
            f"the answerer returned records of {[record.get('id') for record in records][:5]}... for the items "
            f"{[item.id for item in items][:5]}...; it must return one record per item, in order"
        )
    return [{"image": item.image, "prompt": item.prompt, **record} for item, record in zip(items, records, strict=True)]


def _error(item: Item, error: Exception) -> Record:
    text = " ".join(str(error).split())[:500] or "no message"
    return {"id": item.id, "image": item.image, "prompt": item.prompt, "error": f"{type(error).__name__}: {text}"}
