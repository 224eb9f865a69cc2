"""A table's answers, specs and versions in one file that anybody can score again without a GPU."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import platform
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import benchmarks
from .base import Item
from .benchmarks import Benchmark
from .collect import Answered
from .spec import Spec, hash_questions, hash_truth

FORMAT = 1
PACKAGES = ("vlmfix", "torch", "transformers", "accelerate", "triton", "numpy", "pillow", "pycocotools", "tokenizers")
_EPOCH = (1980, 1, 1, 0, 0, 0)

Load = Callable[..., Benchmark]
"""(name, **options) -> benchmark."""


@dataclass(frozen=True)
class Verification:
    """What scoring a bundle again found.

    Args:
        problems: whatever does not agree; empty if everything does.
        figures: row -> per seed, metric -> figure, as scored now.
        checked: numbers of files, answers and figures that were compared.
    """

    problems: Sequence[str]
    figures: Mapping[str, Sequence[Mapping[str, float]]]
    checked: Mapping[str, int]

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return not self.problems


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that decide answers; absent ones are left out."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(
    path: str | Path,
    name: str,
    options: Mapping[str, Any],
    rows: Sequence[Answered],
    tables: Mapping[str, str] | None = None,
    load: Load = benchmarks.load,
) -> Path:
    """Writes a bundle. Files that the benchmark's options name go along, pictures do not.

    Args:
        path: of the zip file.
        name: of the benchmark.
        options: of the benchmark.
        rows: what `collect.collect` returned.
        tables: file name -> text, the printed tables.
        load: makes the benchmark; by default `benchmarks.load`.
    """
    contents: dict[str, bytes] = {f"tables/{key}": text.encode() for key, text in (tables or {}).items()}
    kept = {key: _packed(key, value, contents) for key, value in options.items()}
    benchmark, entries = load(name, **options), []
    for number, row in enumerate(rows):
        asked = hash_questions(row.asked)
        contents[f"items/{asked[:16]}.jsonl"] = _lines(vars(item) for item in row.asked)
        seeds = []
        for seed, records in enumerate(row.answers):
            place = f"answers/{number:02d}-{seed}.jsonl"
            contents[place] = _lines(records)
            spec = row.specs[seed].to_json() if row.specs else None
            seeds.append({"answers": place, "spec": spec, "figures": _finite(benchmark.score(records).figures())})
        entry = {"name": row.name, "kind": row.kind, "items": f"items/{asked[:16]}.jsonl", "seeds": seeds}
        entries.append({**entry, "partial": len(row.asked) < len(benchmark.items())})
    manifest = {
        "format": FORMAT,
        "versions": versions(),
        "benchmark": {"name": name, "options": kept, "label": benchmark.label},
        "rows": entries,
        "files": {key: hashlib.sha256(data).hexdigest() for key, data in contents.items()},
    }
    contents["manifest.json"] = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key in sorted(contents):
            file.writestr(zipfile.ZipInfo(key, _EPOCH), contents[key], zipfile.ZIP_DEFLATED)
    return path


def verify(path: str | Path, load: Load = benchmarks.load, tolerance: float = 1e-9) -> Verification:
    """Scores a bundle again and compares everything that it states. Needs neither model nor pictures.

    Args:
        path: of the zip file.
        load: as in `write`.
        tolerance: of figures.

    Raises:
        UsageError: if the file is no bundle.
    """
    try:
        with zipfile.ZipFile(path) as file:
            contents = {name: file.read(name) for name in file.namelist()}
        manifest = json.loads(contents.pop("manifest.json"))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UsageError(f"{path} is no bundle of vlmfix: {error}") from error
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path} has the bundle format {manifest.get('format')!r}, this version reads {FORMAT}")
    problems = _compare_files(manifest["files"], contents)
    figures: dict[str, list[Mapping[str, float]]] = {}
    stated, count = manifest["benchmark"], {"files": len(contents), "answers": 0, "figures": 0}
    with tempfile.TemporaryDirectory() as folder:
        benchmark = load(stated["name"], **_unpacked(stated["options"], contents, Path(folder)))
        truth = hash_truth(benchmark.items())
        for row in manifest["rows"]:
            items = [Item(**entry) for entry in _objects(contents[row["items"]])]
            figures[row["name"]] = found = []
            for entry in row["seeds"]:
                records = _objects(contents[entry["answers"]])
                count["answers"] += len(records)
                spec = Spec.from_json(entry["spec"]) if entry["spec"] else None
                if spec and spec.truth != truth:
                    problems.append(f"{row['name']}: the truth is not the one of the run")
                if spec and not row["partial"] and spec.questions != hash_questions(items):
                    problems.append(f"{row['name']}: the questions are not those of the run")
                problems += _compare_answers(row["name"], spec, items, records)
                found.append(benchmark.score(records).figures())
                count["figures"] += len(entry["figures"])
                problems += _compare_figures(row["name"], entry["figures"], found[-1], tolerance)
    return Verification(problems, figures, count)


def _compare_files(stated: Mapping[str, str], contents: Mapping[str, bytes]) -> list[str]:
    found = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    lost = [f"{name} is missing" for name in stated if name not in found]
    extra = [f"{name} is not in the manifest" for name in found if name not in stated]
    return lost + extra + [f"{k} was changed" for k in stated if k in found and stated[k] != found[k]]


def _compare_answers(
    name: str, spec: Spec | None, items: Sequence[Item], records: Sequence[Mapping[str, Any]]
) -> list[str]:
    asked = {item.id: item.prompt for item in items}
    found = {"belong to no item": [r["id"] for r in records if r["id"] not in asked]}
    if spec:
        found["were made by another run"] = [r["id"] for r in records if r.get("spec") != spec.answers_hash]
        found["are to other prompts"] = [r["id"] for r in records if r.get("prompt") != asked.get(r["id"])]
    return [f"{name}: {len(ids)} answers {what}, first {ids[0]}" for what, ids in found.items() if ids]


def _compare_figures(
    name: str, stated: Mapping[str, float | None], found: Mapping[str, float], tolerance: float
) -> list[str]:
    problems = []
    for metric, value in stated.items():
        now = _finite(found).get(metric)
        same = value is now is None or (value is not None and now is not None and abs(value - now) <= tolerance)
        if not same:
            problems.append(f"{name}: {metric} is stated as {value}, scored again it is {now}")
    return problems


def _packed(key: str, value: Any, contents: dict[str, bytes]) -> Any:
    """The value of an option; a file or folder of annotations becomes a place in the bundle."""
    path = Path(value) if isinstance(value, (str, Path)) and str(value) else None
    if path is None or not path.exists():
        return value
    files = [path] if path.is_file() else [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".jsonl", ".gz")]
    for file in files:
        contents[f"data/{key}/{file.name}"] = file.read_bytes()
    return {"packed": f"data/{key}/{path.name}" if path.is_file() else f"data/{key}"}


def _unpacked(options: Mapping[str, Any], contents: Mapping[str, bytes], folder: Path) -> dict[str, Any]:
    """Options with the packed files written below a folder."""
    for name, data in contents.items():
        parts = Path(name).parts
        if parts[0] == "data":
            if len(parts) != 3 or ".." in parts:
                raise UsageError(f"the bundle holds a file of the strange name {name}")
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    return {k: str(folder / v["packed"]) if isinstance(v, dict) and "packed" in v else v for k, v in options.items()}


def _lines(records: Any) -> bytes:
    text = io.StringIO()
    for record in records:
        text.write(json.dumps(record, ensure_ascii=True) + "\n")
    return text.getvalue().encode()


def _objects(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if value == value else None for name, value in figures.items()}
