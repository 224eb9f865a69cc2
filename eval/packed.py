"""Answers of many runs in a few small files, to carry them from the machine that answered to the one that scores."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .spec import Spec
from .store import Store
from .stored import REFUSED

_REMADE = "spec"
FORMAT = 1


def pack(folder: str | Path, out: str | Path, size: int = 15 << 20, processes: int = 1) -> list[Path]:
    """Writes the runs of a folder into `answers-N.jsonl.gz`.

    Of each run come its small JSON files and one line per record, in order of the ids, which holds what differs from
    the line before.

    Args:
        folder: what `suite.run` wrote to.
        out: folder of the new files.
        size: bytes that a file may hold, if no single run needs more.
        processes: that read and compress.

    Raises:
        UsageError: if the folder holds no runs.
    """
    runs = sorted({path.parent for path in Path(folder).glob("*/spec-*.json")})
    if not runs:
        raise UsageError(f"{folder} holds no answers; give the folder `answers` of --out")
    Path(out).mkdir(parents=True, exist_ok=True)
    told = Path(folder) / REFUSED
    reasons = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    head = gzip.compress(f"{json.dumps({'format': FORMAT, 'refused': reasons})}\n".encode(), mtime=0)
    written: list[Path] = []
    filled = size
    with ProcessPoolExecutor(processes) as pool:
        for data in pool.map(_packed, runs):
            if filled + len(data) > size:
                written.append(Path(out) / f"answers-{len(written)}.jsonl.gz")
                written[-1].write_bytes(head)
                filled = len(head)
            with written[-1].open("ab") as file:  # compressed pieces one after the other are one compressed file
                file.write(data)
            filled += len(data)
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
            if "refused" in line:
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / REFUSED).write_text(json.dumps(line["refused"], indent=1) + "\n", encoding="utf-8")
            elif "run" in line:
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


def _packed(run: Path) -> bytes:
    lines = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in _lines(run))
    return gzip.compress("".join(lines).encode("utf-8", "surrogatepass"), mtime=0)


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*.json"))}
    specs = [Spec.from_json(content) for name, content in files.items() if name.startswith("spec-")]
    for answers in sorted({spec.answers_hash for spec in specs}):
        merged = Store(run, answers).read()
        records = {**merged.errors, **merged.answers}
        yield {"run": run.name, "answers": answers, "files": files}
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
        with gzip.open(path, "rt", encoding="utf-8", errors="surrogatepass") as file:
            for number, text in enumerate(file):
                line = json.loads(text)
                if number == 0 and line.get("format") != FORMAT:
                    raise UsageError(f"{path} holds no packed answers of this version")
                yield line
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} holds no packed answers: {error}") from error
