"""Folders and prompt files as items: what is asked about which pictures, and what could not be understood."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from vlmfix.errors import UsageError, nearest
from vlmfix.pictures import is_picture
from vlmfix.rows import SUFFIXES, Row, read_rows

PROMPT_FILES = ("prompts.jsonl", "prompts.csv", "prompts.tsv")
"""Prompt files looked for in a folder of pictures."""


@dataclass(frozen=True)
class Item:
    """One prompt about pictures.

    Args:
        id: unique among the items; without an `id` column, picture name and a digest of the prompt.
        images: picture files, none for a prompt without a picture.
        prompt: the text asked.
        names: the pictures as the source writes them.
        where: picture, or file and line, that it came from.
    """

    id: str
    images: tuple[Path, ...]
    prompt: str
    names: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class Fault:
    """A line or picture that gives no item.

    Args:
        id: picture, or file and line.
        error: what is wrong and how to mend it.
    """

    id: str
    error: str


@dataclass
class Items:
    """What a source holds.

    Args:
        items: what can be asked, by id, in the order of the source.
        faults: what cannot.
        notes: what was left out by rule.
    """

    items: dict[str, Item] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def _add(self, row: Row, prompt: str | None, base: Path, where: str) -> None:
        """Adds the row's item, or its fault."""
        try:
            item = _item(row, prompt, base, where)
        except _RowError as error:
            self.faults.append(Fault(where, f"{where}: {error}"))
            return
        earlier = self.items.setdefault(item.id, item)
        if earlier is item:
            return
        if (earlier.images, earlier.prompt) == (item.images, item.prompt):
            self.notes.append(f"{where} repeats {earlier.where}: asked once")
        else:
            clash = f"{where}: id {item.id!r} was used at {earlier.where}; give every line its own id"
            self.faults.append(Fault(where, clash))


class _RowError(Exception):
    """A row that gives no item; the message says why."""


def collect(source: Path, prompt: str | None = None) -> Items:
    """Reads a picture, a folder of pictures, or a prompt file (.jsonl, .csv, .tsv) with an `image` column.

    A folder with `prompts.jsonl` (or .csv, .tsv) is read from that file; otherwise every picture in it, at any depth,
    is asked `prompt`, or each line of `name.txt` beside `name.jpg`. A prompt without fields asks every picture of a
    folder once; one with fields, such as "Is this a {title}?", is filled from the row's columns, or from {name}, {stem}
    and {prompt} of a picture.

    Args:
        source: picture, folder or prompt file.
        prompt: text or template that replaces the source's own prompts.

    Raises:
        UsageError: nothing in the source can give an item.
    """
    fields = _fields(prompt) if prompt is not None else []
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder; check the path")
    if source.is_dir():
        listed = [source / name for name in PROMPT_FILES if (source / name).is_file()]
        if len(listed) > 1:
            raise UsageError(f"{source} has {' and '.join(path.name for path in listed)}; give the one you mean")
        if listed and (prompt is None or fields):
            return _from_rows(listed[0], prompt, fields)
        found = _from_pictures(source, prompt, fields)
        found.notes.extend(
            f"{path.name} was left aside: a --prompt without fields asks every picture" for path in listed
        )
        return found
    if source.suffix.lower() in SUFFIXES:
        return _from_rows(source, prompt, fields)
    if is_picture(source):
        return _from_pictures(source, prompt, fields)
    raise UsageError(
        f"{source}: give a picture, a folder of pictures, or a .jsonl, .csv or .tsv file with an image column"
    )


def _fields(prompt: str) -> list[str]:
    try:
        fields = [name for _, name, _, _ in Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise UsageError(
            f"prompt {prompt!r}: {error}; write {{{{ and }}}} for braces that stand for themselves"
        ) from None
    if "" in fields:
        raise UsageError(
            f"prompt {prompt!r}: a field needs a column name, as in {{title}}; write {{{{}}}} for plain braces"
        )
    return fields


def _fill(prompt: str, row: Row) -> str:
    parts: list[str] = []
    for text, name, style, _ in Formatter().parse(prompt):
        parts.append(text)
        if name is not None:
            if row.get(name) is None:
                raise _RowError(_unknown(name, [key for key, value in row.items() if value is not None]))
            try:
                parts.append(format(row[name], style or ""))
            except (ValueError, TypeError) as error:
                raise _RowError(
                    f"field {{{name}:{style}}} of the prompt: {error}; mend the value or the format"
                ) from None
    return "".join(parts)


def _unknown(name: str, known: list[str]) -> str:
    return (
        f"the prompt's field {{{name}}} is no column here{nearest(name, known)}; write {{{{ and }}}} for plain braces"
    )


def _from_pictures(source: Path, prompt: str | None, fields: list[str]) -> Items:
    for name in fields:
        if name not in ("name", "stem", "prompt"):
            raise UsageError(_unknown(name, ["name", "stem", "prompt"]))
    found = Items()
    base, files = (source.parent, [source]) if source.is_file() else (source, sorted(_visible_files(source)))
    photos = [path for path in files if is_picture(path)]
    if not photos:
        raise UsageError(f"{source}: no pictures in this folder; file names must end in .jpg, .png, .webp and the like")
    if prompt is None and not any(path.with_suffix(".txt").is_file() for path in photos):
        raise UsageError(
            f"{source}: no prompt; give --prompt TEXT, or write prompts into .txt files beside the pictures"
        )
    beside_pictures = {path.with_suffix(".txt") for path in photos} | {source / name for name in PROMPT_FILES}
    others = [path for path in files if not is_picture(path) and path not in beside_pictures]
    if others:
        some = ", ".join(str(path.relative_to(base)) for path in others[:3]) + (" ..." if len(others) > 3 else "")
        found.notes.append(f"{len(others)} files are no pictures by name and were left out: {some}")
    for path in photos:
        name = path.relative_to(base).as_posix()
        beside = prompt is None or "prompt" in fields
        try:
            texts: list[str | None] = [*(_lines_beside(path) if beside else [])] or [None]
        except UnicodeDecodeError:
            found.faults.append(Fault(name, f"{path.with_suffix('.txt')}: not UTF-8; save it as UTF-8"))
            continue
        for text in texts:
            found._add({"image": name, "name": name, "stem": path.stem, "prompt": text}, prompt, base, name)
    return found


def _visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _lines_beside(picture: Path) -> Iterator[str]:
    path = picture.with_suffix(".txt")
    if path.is_file():
        yield from (line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())


def _from_rows(path: Path, prompt: str | None, fields: list[str]) -> Items:
    found = Items()
    for line, row in read_rows(path, ["image", *(fields if prompt is not None else ["prompt"])]):
        where = f"{path.name} line {line}"
        if isinstance(row, str):
            found.faults.append(Fault(where, f"{where}: {row}"))
        else:
            found._add(row, prompt, path.parent, where)
    if not found.items and not found.faults:
        raise UsageError(f"{path}: holds no rows; write one JSON object a line, or a CSV header and rows")
    return found


def _item(row: Row, prompt: str | None, base: Path, where: str) -> Item:
    if "image" not in row:
        raise _RowError(
            f'no "image"{nearest("image", row)}; name the picture file, or null for a prompt without a picture'
        )
    value = row["image"]
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) and each for each in names):
        raise _RowError('"image" must be a file name or a list of file names')
    text = row.get("prompt") if prompt is None else _fill(prompt, row)
    if not isinstance(text, str) or not text.strip():
        raise _RowError('no prompt; fill "prompt", ask with --prompt, or write it into a .txt file beside the picture')
    given = row.get("id")
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    except UnicodeEncodeError:
        raise _RowError("the prompt holds half a surrogate pair; write it as plain UTF-8") from None
    key = f"{'|'.join(names)}:{digest}" if given in (None, "") else str(given)
    return Item(key, tuple(base / each for each in names), text, tuple(names), where)
