"""Answers made elsewhere, as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from .base import Item
from .benchmarks import Benchmark
from .benchmarks.files import Problems
from .guards import Record

_FATAL = ("answers whose id", "repeated answers", "records without text", "errors")


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


def checked(
    name: str, records: Sequence[Record], benchmark: Benchmark, items: Sequence[Item]
) -> tuple[list[Record], list[str]]:
    """Foreign records under the items' ids, if they answer exactly these questions.

    Args:
        name: the row's name, for messages.
        records: each with `id` and `text`, and `prompt` if the file has it.
        benchmark: finds the item of each record.
        items: the items of the table, all of the benchmark's or its first ones.

    Returns:
        One record per item, in their order, and notes on what could not be checked.

    Raises:
        UsageError: if ids are missing, unknown or repeated, a text is missing, or a prompt differs.
    """
    problems = Problems()
    replies = {reply.item.id: reply for reply in benchmark.replies(records, problems)}
    for kind, names in problems.kinds.items():
        if kind.startswith(_FATAL):
            raise UsageError(f"{name} cannot be compared: {len(names)} {kind}: {', '.join(names[:5])}")
    missing = [item.id for item in items if item.id not in replies]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UsageError(f"{name} cannot be compared: {len(missing)} of {len(items)} items are not answered: {some}")
    found: list[Record] = []
    unprompted = 0
    for item in items:
        record = replies[item.id].record
        prompt = record.get("prompt")
        unprompted += prompt is None
        if prompt is not None and _bare(str(prompt)) != _bare(item.prompt):
            raise UsageError(
                f"{name} cannot be compared: item {item.id!r} was asked {str(prompt)!r}, "
                f"here it is asked {item.prompt!r}"
            )
        found.append({**record, "id": item.id})
    notes = [f"the prompts of {unprompted} answers are not recorded and could not be checked"] if unprompted else []
    return found, notes


def _bare(prompt: str) -> str:
    return " ".join(prompt.replace("<image>", " ").split())
