"""How far a run is, on stderr: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from vlmfix.commands.console import note, screen

EVERY = 10.0
"""Seconds between two lines of a log."""


class Progress:
    """Counts finished items.

    Args:
        name: what runs.
        total: how many items there are to do.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done = self.failed = 0
        self.started = self._said = time.monotonic()
        console = screen(stderr=True)
        self._bar = (
            Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            note(self.line())

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started

    def add(self, done: int, failed: int) -> None:
        """Counts items that were just finished, failed ones among them."""
        self.done += done
        self.failed += failed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate())
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            note(self.line())

    def line(self) -> str:
        """The state in words: counts, rate, time left."""
        left = (self.total - self.done) * self.seconds / max(self.done, 1)
        minutes, seconds = divmod(round(left), 60)
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.name}: {self.done}/{self.total}{failed}, {self._rate()}, {minutes}:{seconds:02d} left"

    def _rate(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        return f"{rate:.2f} answers/s" if rate < 10 else f"{rate:.0f} answers/s"
