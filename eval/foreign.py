"""Answers made elsewhere, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from .base import Item
from .guards import Record


def parse_add(text: str) -> tuple[str, Path]:
    """Name and file of `NAME=FILE`.

    Raises:
        UsageError: if the text has another form or the file does not exist.
    """
    name, sign, file = text.partition("=")
    if not (name.strip() and sign and file.strip()):
        raise UsageError(f"{text!r} is not NAME=FILE; write for example HALC=halc.jsonl")
    path = Path(file.strip())
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a file of answers with --add {name.strip()}=FILE")
    return name.strip(), path


def checked(name: str, records: Sequence[Record], items: Sequence[Item]) -> tuple[dict[str, Record], list[str]]:
    """Foreign records by item id, if they answer exactly these questions.

    Args:
        name: the row's name, for messages.
        records: each with `id` and `text`, and `prompt` if the file has it.
        items: the benchmark's items.

    Returns:
        The records by id, and notes on what could not be checked.

    Raises:
        UsageError: if ids are missing, unknown or repeated, a text is missing, or a prompt differs.
    """
    known: dict[str, Item] = {item.id: item for item in items}
    found: dict[str, Record] = {}
    unprompted = 0
    for number, record in enumerate(records, 1):
        key = str(record.get("id"))
        if key not in known:
            raise UsageError(f"{name}: record {number} answers item {key!r}, which the benchmark does not have")
        if key in found:
            raise UsageError(f"{name}: item {key!r} is answered twice, the second time in record {number}")
        if not isinstance(record.get("text"), str):
            raise UsageError(f"{name}: record {number} (item {key!r}) has no text")
        prompt = record.get("prompt")
        unprompted += prompt is None
        if prompt is not None and str(prompt).strip() != known[key].prompt.strip():
            raise UsageError(
                f"{name}: item {key!r} was asked {str(prompt)!r}, here it is asked {known[key].prompt!r}; "
                "answers to other prompts cannot be compared"
            )
        found[key] = {**record, "id": key}
    missing = [key for key in known if key not in found]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UsageError(f"{name}: {len(missing)} of {len(known)} items are not answered: {some}")
    notes = [f"the prompts of {unprompted} answers are not recorded and could not be checked"] if unprompted else []
    return found, notes


def by_id(records: Sequence[Record]) -> Mapping[str, Record]:
    """Records by item id."""
    return {str(record["id"]): record for record in records}
