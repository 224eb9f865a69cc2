"""One run = one spec: everything that decides its answers and scores, hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from .base import Item

_JUDGING = ("truth", "scorer")


@dataclass(frozen=True)
class Spec:
    """What a run is.

    Args:
        model: checkpoint name or folder.
        recipe: recipe text.
        benchmark: name of the benchmark, its split included.
        questions: hash of the questions (`hash_questions`).
        truth: hash of what the scorer knows of them (`hash_truth`).
        scorer: name of the scorer and its variant.
        revision: commit of the checkpoint; None if it has none.
        recipe_json: the compiled recipe, every hyper-parameter resolved.
        protocol: picture protocol, `hf` or `paper`, with its preset.
        processor: the processor's resolved configuration.
        template: one rendered prompt, its question replaced by a placeholder.
        generation: generation settings (token limit, sampling, beams, penalties, stop strings).
        weights: how the weights were loaded: dtype, quantisation.
        seed: seed of the draws; None for deterministic decoding.
    """

    model: str
    recipe: str
    benchmark: str
    questions: str
    truth: str = ""
    scorer: str = ""
    revision: str | None = None
    recipe_json: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = "hf"
    processor: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        canonical(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary of the fields."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Spec:
        """The spec of a dictionary.

        Raises:
            UsageError: for an unknown or a missing key.
        """
        known = {f.name for f in dataclasses.fields(Spec)}
        for key in data:
            if key not in known:
                raise UsageError(f"unknown key {key!r} in a spec{nearest(key, known)}")
        missing = {"model", "recipe", "benchmark", "questions"} - set(data)
        if missing:
            raise UsageError(f"a spec needs the keys {', '.join(sorted(missing))}")
        return Spec(**data)

    @property
    def hash(self) -> str:
        """sha256 of everything; the key of a result."""
        return digest(self.to_json())

    @property
    def answers_hash(self) -> str:
        """sha256 of what decides the answers; the key of the store, shared by every scorer variant."""
        return digest({key: value for key, value in self.to_json().items() if key not in _JUDGING})

    def write(self, folder: str | Path) -> Path:
        """Writes `spec-HASH.json` into a folder and returns its path."""
        path = Path(folder) / f"spec-{self.hash[:16]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(self.to_json(), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return path


def canonical(value: Any, where: str = "spec") -> str:
    """The one JSON text of a value: sorted keys, no blanks, 1.0 written as 1.

    Raises:
        UsageError: naming the place of a value that has no canonical form (nan, a set, an object).
    """
    return json.dumps(_plain(value, where), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def hash_questions(items: Sequence[Item]) -> str:
    """sha256 of the ids, pictures and prompts, in order."""
    return digest([[item.id, item.image, item.prompt] for item in items])


def hash_truth(items: Sequence[Item]) -> str:
    """sha256 of the truths, in order."""
    return digest([[item.id, item.truth] for item in items])


def hash_files(paths: Sequence[str | Path]) -> str:
    """sha256 of the contents of files, in order; the pictures of a benchmark, say."""
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{where} is {value}, which JSON cannot hold; give a finite number")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UsageError(f"{where} has the key {key!r}; keys must be text")
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{where}[{place}]") for place, entry in enumerate(value)]
    raise UsageError(
        f"{where} is a {type(value).__name__}, which has no canonical JSON; give numbers, texts, lists, objects"
    )
