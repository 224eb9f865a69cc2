"""Answers of other tools as answer records: OPERA, PAI, LLaVA, AMBER, POPE and lmms-eval logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from .benchmarks.files import Problems, read_objects

Row = Mapping[str, Any]


def _ours(row: Row, number: int) -> dict[str, Any] | None:
    """`{"id", "text"}` or `{"id", "error"}`, with anything beside them."""
    return {**row, "id": str(row["id"])} if "id" in row and ("text" in row or "error" in row) else None


def _captions(row: Row, number: int) -> dict[str, Any] | None:
    """OPERA's and PAI's CHAIR logs: `image_id` and `caption`."""
    if "image_id" not in row or "caption" not in row:
        return None
    return {"id": str(row["image_id"]), "image": str(row.get("image", row["image_id"])), "text": row["caption"]}


def _llava(row: Row, number: int) -> dict[str, Any] | None:
    """LLaVA's answer files: `question_id`, `prompt`, `text`, sometimes the picture."""
    if "question_id" not in row or "text" not in row:
        return None
    record = {"id": str(row["question_id"]), "text": row["text"]}
    image = row.get("image", row.get("image_id"))
    return record | ({} if image is None else {"image": str(image)}) | _prompt(row.get("prompt"))


def _amber(row: Row, number: int) -> dict[str, Any] | None:
    """AMBER's response files: `id` and `response`."""
    return {"id": str(row["id"]), "text": row["response"]} if "id" in row and "response" in row else None


def _pope(row: Row, number: int) -> dict[str, Any] | None:
    """POPE's answer files: `question` and `answer`, in the order of the question file."""
    if "question" not in row or "answer" not in row:
        return None
    return {"id": str(number), "text": row["answer"]} | _prompt(row["question"])


def _lmms(row: Row, number: int) -> dict[str, Any] | None:
    """Samples of lmms-eval: `doc` and `filtered_resps`, nested or, since 2026, flat."""
    if "doc" not in row or not ("filtered_resps" in row or "resps" in row):
        return None
    doc = row["doc"] if isinstance(row["doc"], dict) else {}
    name = _first(doc, ("question_id", "image_id", "id")) or str(row.get("doc_id", number))
    image = _first(doc, ("image_source", "image", "image_path", "image_name", "file_name", "image_id"))
    found: Any = row.get("filtered_resps") or row.get("resps")
    while isinstance(found, list):
        found = found[0] if found else None
    asked = row.get("input") or next((a for a in row.get("arguments") or () if isinstance(a, str)), doc.get("question"))
    return {"id": name, "text": found} | ({} if image is None else {"image": image}) | _prompt(asked)


FORMATS: Mapping[str, Callable[[Row, int], dict[str, Any] | None]] = {
    "vlmfix": _ours,
    "lmms-eval": _lmms,
    "opera": _captions,
    "pai": _captions,
    "llava": _llava,
    "amber": _amber,
    "pope": _pope,
}
"""Format -> reader of one row; None if the row has another shape. The order is that of the trial."""


def read_answers(path: str | Path, problems: Problems, format: str = "auto") -> list[dict[str, Any]]:
    """Answer records of a file: JSON lines, an array, or pretty-printed objects.

    Args:
        path: answers or log, packed with gzip or not.
        problems: takes malformed lines and rows of another shape.
        format: one of `FORMATS`, or `auto`: the first that reads the first row.

    Raises:
        UsageError: for an unknown format, or a file whose rows have none of the shapes.
    """
    if format not in ("auto", *FORMATS):
        raise UsageError(f"unknown format {format!r}{nearest(format, ('auto', *FORMATS))}")
    rows = read_objects(path, problems)
    if format == "auto":
        format = next((name for name, read in FORMATS.items() if any(read(row, 1) for row in rows[:20])), "")
    if not format:
        raise UsageError(
            f"{path} holds rows with the keys {', '.join(sorted(rows[0]))}, no known answer format; "
            "write one object a line with id, image, prompt and text"
        )
    records = []
    for number, row in enumerate(rows, 1):
        record = FORMATS[format](row, number)
        if record is None:
            problems.add(f"rows that are no {format} answers", f"{Path(path).name} row {number}")
        else:
            records.append(record)
    if not records:
        raise UsageError(f"no row of {path} is an answer in the format {format}; leave the format to be found out")
    return records


def _first(doc: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((str(doc[key]) for key in keys if isinstance(doc.get(key), (str, int))), None)


def _prompt(text: Any) -> dict[str, str]:
    return {"prompt": text} if isinstance(text, str) else {}
