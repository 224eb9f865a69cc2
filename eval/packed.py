"""Answers of many runs in a few small files, to carry them from the machine that answered to the one that scores."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .store import Store

_REMADE = "spec"
FORMAT = 1


def pack(folder: str | Path, out: str | Path, size: int = 15 << 20) -> list[Path]:
    """Writes the runs of a folder into `answers-N.jsonl.gz`.

    Of each run come its small JSON files and one line per record, in order of the ids, which holds what differs from
    the line before.

    Args:
        folder: what `suite.run` wrote to.
        out: folder of the new files.
        size: bytes after which a new file begins with the next run.

    Raises:
        UsageError: if the folder holds no runs.
    """
    runs = sorted({path.parent for path in Path(folder).glob("*/spec-*.json")})
    if not runs:
        raise UsageError(f"{folder} holds no answers; give the folder `answers` of --out")
    Path(out).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    file: gzip.GzipFile | None = None
    try:
        for run in runs:
            if file is None or written[-1].stat().st_size > size:
                if file is not None:
                    file.close()
                written.append(Path(out) / f"answers-{len(written)}.jsonl.gz")
                file = gzip.GzipFile(written[-1], "wb", mtime=0)
            for line in _lines(run):
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            file.flush()
    finally:
        if file is not None:
            file.close()
    return written


def unpack(files: Sequence[str | Path], folder: str | Path) -> int:
    """Writes packed runs back as folders of answers; runs that are there already stay as they are.

    Args:
        files: what `pack` wrote.
        folder: for the runs.

    Returns:
        The number of runs written.

    Raises:
        UsageError: naming a file that is none of `pack`'s.
    """
    count, store, last = 0, None, dict[str, Any]()
    batch: list[dict[str, Any]] = []
    for path in files:
        for line in _read(Path(path)):
            if "run" in line:
                _keep(store, batch)
                place = Path(folder) / line["run"]
                store, last = (None if place.exists() else Store(place, line["answers"])), {}
                if store is not None:
                    place.mkdir(parents=True)
                    count += 1
                    for name, content in line["files"].items():
                        (place / Path(name).name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            else:
                last = {**{key: value for key, value in last.items() if key not in line.get("-", ())}, **line}
                last.pop("-", None)
                batch.append(dict(last))
    _keep(store, batch)
    return count


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*.json"))}
    hashes = {json.loads(line)["spec"] for path in run.glob("*.jsonl") for line in path.open(encoding="utf-8")}
    for answers in sorted(hashes):
        merged = Store(run, answers).read()
        records = {**merged.errors, **merged.answers}
        yield {"format": FORMAT, "run": run.name, "answers": answers, "files": files}
        last: dict[str, Any] = {}
        for key in sorted(records):
            record = {name: _short(value) for name, value in records[key].items() if name != _REMADE}
            gone = [name for name in last if name not in record]
            changed = {name: value for name, value in record.items() if name not in last or last[name] != value}
            yield changed | ({"-": gone} if gone else {})
            last = record


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _keep(store: Store | None, batch: list[dict[str, Any]]) -> None:
    if store is not None:
        with store:
            store.extend(batch)
    batch.clear()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file):
                line = json.loads(text)
                if number == 0 and line.get("format") != FORMAT:
                    raise UsageError(f"{path} holds no packed answers of this version")
                yield line
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} holds no packed answers: {error}") from error
