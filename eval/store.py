"""Append-only answers, one JSON object a line, that survive kill -9 and another number of processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from ..errors import UsageError, VlmfixError

with contextlib.suppress(ImportError):  # not on Windows: no lock there
    import fcntl

Record = dict[str, Any]


@dataclass
class Merged:
    """What all files of a store say together.

    Args:
        answers: item id -> first answer.
        errors: item id -> last error, for items without an answer.
        problems: broken lines and repeated answers, named.
    """

    answers: dict[str, Record] = field(default_factory=dict)
    errors: dict[str, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Store:
    """Answers of one spec.

    A record holds `id` and either `text` (an answer, the empty one included) or `error` (why there is none); the store
    adds `spec`. A file may hold records of several specs; only those of `spec_hash` are seen.

    Args:
        path: a file `NAME.jsonl`, written by one store at a time, or a folder, where each store writes its own file
            and reading merges all files.
        spec_hash: the key shared by all records of the run.
    """

    def __init__(self, path: str | Path, spec_hash: str) -> None:
        self.path = Path(path)
        self.spec_hash = spec_hash
        self.single = self.path.is_file() or (not self.path.is_dir() and self.path.suffix in (".jsonl", ".json"))
        self._file: FileIO | None = None
        self._where = self.path
        self._answered: set[str] = set()

    @property
    def written(self) -> Path:
        """The file that this store wrote to; its path as given as long as nothing was written."""
        return self._where

    def read(self) -> Merged:
        """Merges all files; nothing is cached, so the answers of other processes appear."""
        merged, places = Merged(), dict[str, str]()
        for path in self.files():
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if line.strip():
                    self._take(merged, places, line, f"{path.name}:{number}")
        for key in merged.answers:
            merged.errors.pop(key, None)
        return merged

    def files(self) -> list[Path]:
        """The files that exist, in order of their names."""
        if self.single:
            return [self.path] if self.path.exists() else []
        return sorted(self.path.glob("*.jsonl")) if self.path.is_dir() else []

    def done(self, retry_errors: bool = False) -> set[str]:
        """Ids that need no further work: answered, and failed unless errors are to be retried."""
        merged = self.read()
        return set(merged.answers) | (set() if retry_errors else set(merged.errors))

    def records(self) -> list[Record]:
        """Answers, one per item."""
        return list(self.read().answers.values())

    def errors(self) -> list[Record]:
        """The last error of each item without an answer."""
        return list(self.read().errors.values())

    def problems(self) -> list[str]:
        """Broken lines and repeated answers, named."""
        return self.read().problems

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record to the disk before it returns; see `extend`."""
        self.extend([record])

    def extend(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records to the disk before it returns, in one write.

        Raises:
            UsageError: for a record without id, with neither or both of text and error, or whose item has an answer.
            VlmfixError: if the file cannot be written.
        """
        records = list(records)
        if not records:
            return
        file = self._open()
        answered, lines = set(self._answered), []
        for record in records:
            flaw = _flaw(record)
            if flaw:
                raise UsageError(f"record {record.get('id')!r} {flaw}")
            if record["id"] in answered:
                raise UsageError(
                    f"item {record['id']!r} has an answer in {self.path}; each item is answered once per spec"
                )
            if "text" in record:
                answered.add(record["id"])
            lines.append(_line({"spec": self.spec_hash, **_plain(record, str(record["id"]))}))
        self._write(file, b"".join(lines))
        self._answered = answered

    def close(self) -> None:
        """Closes the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> FileIO:
        if self._file is not None:
            return self._file
        self._where = self.path if self.single else self.path / f"{_unique()}.jsonl"
        try:
            self._where.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(self._where, "a+")
        except OSError as error:
            raise VlmfixError(f"{self._where} cannot be written: {error.strerror}; choose another place") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise VlmfixError(f"{self._where} is being written already; give a folder to share it") from None
        except (OSError, NameError):
            pass  # no locks on this file system
        self._file = file
        self._answered = set(self.read().answers)
        size = os.fstat(file.fileno()).st_size
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            self._write(file, b"\n")  # seals a line that a killed process left unfinished
        return file

    def _write(self, file: FileIO, data: bytes) -> None:
        size, view = os.fstat(file.fileno()).st_size, memoryview(data)
        try:
            while view:
                view = view[os.write(file.fileno(), view) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise VlmfixError(
                f"{self._where} cannot be written: {error.strerror}; the answers before this one are safe, "
                "mend it and start again: the run goes on where it stopped"
            ) from error

    def _take(self, merged: Merged, places: dict[str, str], line: bytes, place: str) -> None:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            merged.problems.append(f"{place}: unfinished or broken line, its item counts as not answered")
            return
        flaw = _flaw(record) if isinstance(record, dict) else "is not an object"
        if flaw or "spec" not in record:
            merged.problems.append(f"{place}: the record {flaw or 'has no spec'}, it is not used")
        elif record["spec"] != self.spec_hash:
            return
        elif "error" in record:
            merged.errors[record["id"]] = record
        elif record["id"] in merged.answers:
            same = "the same" if merged.answers[record["id"]]["text"] == record["text"] else "another"
            first = places[record["id"]]
            merged.problems.append(f"{place}: {same} answer to item {record['id']!r} as in {first}; the first counts")
        else:
            merged.answers[record["id"]], places[record["id"]] = record, place


def _flaw(record: Mapping[str, Any]) -> str:
    """What is wrong with a record; empty if nothing."""
    if not isinstance(record.get("id"), str):
        return "has no id (a text)"
    if ("text" in record) == ("error" in record):
        return "needs either text or error"
    if not isinstance(record.get("text", record.get("error")), str):
        return "holds no text under text or error"
    return ""


def _unique() -> str:
    """A file name that no other process uses; the earliest writer sorts first."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    host = "".join(c for c in socket.gethostname() if c.isalnum())[:16]
    return f"answers-{stamp}-{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _line(record: Record) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(record).encode() + b"\n"


def _plain(value: Any, where: str) -> Any:
    """JSON values of a record; numbers that JSON does not know become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    raise UsageError(f"record {where} holds a {type(value).__name__}, which JSON does not know")
