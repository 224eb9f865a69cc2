"""Answers meet items: nothing is dropped without being counted and named, and an error is never an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ..base import Item, Metric, Score
from .files import Problems

Record = Mapping[str, Any]
"""`{"id", "image", "prompt", "text"}` or `{"id", ..., "error"}`; tokens, seconds, margin, recipe, report may follow."""

Find = Callable[[Record], str | None]
"""Record -> item id, or None if it belongs to no item."""

_ENGLISH = frozenset(
    ("a", "an", "the", "of", "in", "is", "are", "and", "on", "with", "to", "there", "it", "this", "at")
)
_FOREIGN_YES_NO = frozenset(("ja", "nein", "oui", "non", "si", "sí", "sì", "sim", "não", "da", "net", "niet", "nee"))


@dataclass(frozen=True)
class Reply:
    """One item with its answer.

    Args:
        item: what was asked.
        text: the answer, maybe empty.
        record: everything the answer's record holds.
    """

    item: Item
    text: str
    record: Record


def match(
    items: Sequence[Item], records: Iterable[Record], problems: Problems, find: Find | None = None
) -> list[Reply]:
    """Items with their answers, in the order of the items.

    The first answer to an item counts. Named in `problems`: errors, records without id or text, unknown ids, repeated
    answers, items without an answer, empty answers and answers that are not English.

    Args:
        items: the benchmark's questions.
        records: answer records.
        problems: takes the names.
        find: record -> item id; by default the record's `id`.

    Raises:
        UsageError: if not one record belongs to an item.
    """
    known = {item.id: item for item in items}
    find = find or (lambda record: str(record.get("id")))
    taken: dict[str, Record] = {}
    failed: dict[str, str] = {}
    unknown: list[str] = []
    for number, record in enumerate(records, 1):
        name = str(record["id"]) if record.get("id") is not None else f"record {number}"
        key = find(record)
        if key is None or key not in known:
            unknown.append(name)
        elif "error" in record:
            failed[key] = name
        elif not isinstance(record.get("text"), str):
            problems.add("records without text", name)
        elif key in taken:
            same = taken[key]["text"] == record["text"]
            problems.add("repeated answers" + ("" if same else " that differ, the first counts"), name)
        else:
            taken[key] = record
    if not taken and not failed:
        raise UsageError(
            f"none of the {len(unknown)} answers belongs to an item: answers are called {_some(unknown)}, items "
            f"{_some(list(known))}; check that benchmark, split and annotation file are those of the answers"
        )
    for name in unknown:
        problems.add("answers whose id is not in the benchmark", name)
    for key, name in failed.items():
        if key not in taken:
            problems.add("errors, not scored", name)
    replies = []
    for item in items:
        if item.id in taken:
            replies.append(Reply(item, taken[item.id]["text"], taken[item.id]))
        elif item.id not in failed:
            problems.add("items without an answer, not scored", item.id)
    for reply in replies:
        if not reply.text.strip():
            problems.add("empty answers", reply.item.id)
        elif foreign(reply.text):
            problems.add("answers that seem not to be English", reply.item.id)
    return replies


def foreign(text: str) -> bool:
    """Whether an answer seems not English: another script, eight words without a common one, a foreign yes or no."""
    letters = [c for c in text if c.isalpha()]
    if letters and sum(c < "\u0250" for c in letters) * 2 < len(letters):
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(words) >= 8:
        return not _ENGLISH.intersection(words)
    return len(words) == 1 and words[0] in _FOREIGN_YES_NO


def by_question(items: Sequence[Item], rows: Mapping[str, str] | None = None) -> Find:
    """Finds items for foreign logs: by id, by row number, or by picture and question.

    Args:
        items: their truth may hold `question`, the text without any suffix.
        rows: row number (as text) -> item id, where the numbers are unique.
    """
    ids = {item.id for item in items}
    asked: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        asked.setdefault(Path(item.image).stem, []).append((str(item.truth.get("question", item.prompt)), item.id))

    def find(record: Record) -> str | None:
        key = str(record.get("id"))
        if key in ids:
            return key
        prompt = str(record.get("prompt") or "")
        for name in (record.get("image"), record.get("id")):
            near = [i for question, i in asked.get(Path(str(name)).stem, ()) if question in prompt]
            if len(near) == 1:
                return near[0]
        return (rows or {}).get(key)

    return find


def number_of(name: object) -> str | None:
    """The last run of digits of a picture's name without leading zeros: `COCO_val2014_000000000042.jpg` -> `42`."""
    digits = re.findall(r"\d+", Path(str(name)).stem)
    return str(int(digits[-1])) if digits else None


def table(
    replies: Sequence[Reply],
    rows: Sequence[Mapping[str, float]],
    metrics: Mapping[str, Metric],
    problems: Problems,
    details: Mapping[str, Any] | None = None,
    clusters: Sequence[str] | None = None,
) -> Score:
    """A score from one dictionary of column values per reply.

    Args:
        replies: what was scored.
        rows: column values of each; a column absent from a row is 0 there.
        metrics: figures of the column sums.
        problems: what was not scored as usual.
        details: item id -> extras; under "problems" all names are added.
        clusters: cluster of each reply; by default its picture.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    values = np.array([[row.get(name, 0.0) for name in columns] for row in rows], dtype=np.float64)
    return Score(
        ids=[reply.item.id for reply in replies],
        clusters=list(clusters) if clusters is not None else [reply.item.image for reply in replies],
        columns=columns,
        values=values.reshape(len(rows), len(columns)),
        metrics=metrics,
        problems=problems.lines(),
        details={**(details or {}), "problems": problems.kinds},
    )


def pictures(items: Iterable[Item], folder: str | Path, problems: Problems) -> dict[str, Path]:
    """Picture name -> file in a folder; `COCO_val2014_` in front and the file's ending may differ.

    Args:
        items: whose pictures are wanted; items without a picture are left out.
        folder: searched with all folders in it; where a name holds a folder, only folders of that name.
        problems: takes the pictures that are missing.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"):
            files.setdefault(_bare(path), []).append(path)
    found: dict[str, Path] = {}
    for name in dict.fromkeys(item.image for item in items if item.image):
        parent, exact = Path(name).parent.name, Path(folder) / name
        near = [path for path in files.get(_bare(Path(name)), ()) if parent in ("", path.parent.name)]
        if exact.is_file():
            found[name] = exact
        elif near:
            found[name] = near[0]
        else:
            problems.add("missing pictures", name)
    return found


def _bare(path: Path) -> str:
    return re.sub(r"^COCO_\w+?_", "", path.stem)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") if names else "nothing"
