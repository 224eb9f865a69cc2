"""The file that `run` writes its records to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmfix.errors import UsageError
from vlmfix.eval.store import Store
from vlmfix.items import Fault, Item, Items


def open_store(path: Path, spec: str, *, retry_errors: bool = False) -> Store:
    """The store of one run in an answers file, ready to be appended to.

    A line that a killed run left unfinished is cut off; with `retry_errors` the run's error records are taken out, so
    that no key ever stands twice.

    Args:
        path: a .jsonl file, or a folder that several processes share.
        spec: key of the run.
        retry_errors: whether items that failed are asked again.

    Raises:
        UsageError: the file cannot be written.
    """
    if not path.is_dir():
        if path.suffix != ".jsonl":
            raise UsageError(f"--out {path}: give a .jsonl file, or a folder that exists to share among processes")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
            _tidy(path, spec if retry_errors else None)
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written ({error.strerror}); choose another place") from error
    elif not os.access(path, os.W_OK):
        raise UsageError(f"--out {path}: cannot be written (permission denied); choose another place")
    return Store(path, spec)


@dataclass(frozen=True)
class Left:
    """What a store leaves to do.

    Args:
        items: items without a record.
        faults: faults without a record.
        answered: items that have an answer.
        failed: items and faults whose error record stands.
    """

    items: list[Item]
    faults: list[Fault]
    answered: int
    failed: int


def left_to_do(store: Store, found: Items, *, retry_errors: bool = False) -> Left:
    """Compares a source with the records of a store.

    Raises:
        UsageError: an id is taken by another prompt, so that its answer would be mistaken for this item's.
    """
    merged = store.read()
    errors = {} if retry_errors else merged.errors
    for key, item in found.items.items():
        record = merged.answers.get(key) or errors.get(key)
        if record is not None and record.get("prompt") != item.prompt:
            raise UsageError(f"{store.path} holds another prompt under id {key!r}; choose another --out, or new ids")
    open_items = [item for key, item in found.items.items() if key not in merged.answers and key not in errors]
    open_faults = [fault for fault in found.faults if fault.id not in errors]
    answered = sum(key in merged.answers for key in found.items)
    standing = len(found.items) + len(found.faults) - len(open_items) - len(open_faults) - answered
    return Left(open_items, open_faults, answered, standing)


def _tidy(path: Path, failed_of: str | None) -> None:
    """Cuts an unfinished last line; drops the error records of a run."""
    with path.open("ab+") as file:
        _lock(file)
        file.seek(0)
        data = file.read()
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        kept = b"".join(line for line in lines if failed_of is None or not _is_error(line, failed_of))
        if data.startswith(kept):
            file.truncate(len(kept))
        else:
            beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            beside.write_bytes(kept)
            os.replace(beside, path)


def _lock(file: IO[bytes]) -> None:
    """Fails while another run writes the file."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"--out {file.name}: another run is writing it; wait, or give a folder to share") from error
    except OSError:  # a file system without locks
        return


def _is_error(line: bytes, spec: str) -> bool:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("spec") == spec and "error" in record
