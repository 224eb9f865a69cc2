"""What the methods of a run did, in a few words: nothing stays inactive in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

COMPILED = "compiled"
"""Form of a step whose blocks were compiled, in reports."""
TOLD = "compile=True"
"""Start of a reason that the engine warned of already, with the remedy."""


class Acting:
    """Gathers the reports of the answers of one recipe, batch by batch."""

    def __init__(self) -> None:
        self._answers = 0
        self._tokens: list[int] = []
        self._layers: dict[str, set[int]] = {}
        self._idle: Counter[tuple[str, str]] = Counter()
        self._overridden: set[str] = set()
        self._engines: Counter[tuple[str, str]] = Counter()
        self._compiling = 0.0

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Takes in the reports of the records of one batch that are answers."""
        captures = set()
        for record in records:
            report = record.get("report") or {}
            self._answers += "text" in record
            if isinstance(report.get("visual_tokens"), int):
                self._tokens.append(report["visual_tokens"])
            self._overridden.update(report.get("overridden_generation_config", {}))
            if engine := report.get("engine"):
                self._engines[engine["name"], engine.get("reason", "")] += 1
                if engine.get("form") == COMPILED:
                    captures.add(engine["capture_seconds"])
            for name, did in report.get("methods", {}).items():
                self._layers.setdefault(name, set()).update(did.get("layers", ()))
                if "inactive" in did:
                    self._idle[name, did["inactive"]] += 1
        self._compiling += sum(captures)  # the answers of a batch share one time

    def lines(self) -> list[str]:
        """What was found and touched, what did nothing and why, which settings of the checkpoint were overridden."""
        told = []
        if self._tokens:
            low, high = min(self._tokens), max(self._tokens)
            told.append(f"visual tokens an item: {low}" + (f" to {high}" if high > low else ""))
        told += [f"{name}: layers {_runs(layers)}" for name, layers in self._layers.items() if layers]
        told += [
            f"{name} did nothing for {count} of {self._answers} answers: {why}"
            for (name, why), count in self._idle.items()
        ]
        told += [
            f"engine {name} for {count} of {self._answers} answers" + (f": {why}" if why else "")
            for (name, why), count in self._engines.items()
            if name == "graph" or (why and not why.startswith(TOLD))
        ]
        if self._compiling:
            told.append(f"compiling took {self._compiling:.1f} s")
        if self._overridden:
            told.append(f"settings of the checkpoint overridden: {', '.join(sorted(self._overridden))}")
        return told


def _runs(numbers: Iterable[int]) -> str:
    """`{1, 2, 3, 7}` -> `1-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
