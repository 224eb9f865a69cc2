"""What the commands that answer benchmarks share: options, the grid they make, progress with a time limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import INTERRUPTED, SOME_FAILED, note
from vlmfix.commands.options import key_values
from vlmfix.commands.progress import Progress
from vlmfix.errors import UsageError, nearest

if TYPE_CHECKING:
    from vlmfix.eval.answerer import Opener
    from vlmfix.eval.grid import Grid

Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", metavar="KEY=VALUE", help="Option of the benchmark; may be repeated."),
]
ON_SCENES = ("chair", "pope")
"""Benchmarks that the name `scenes` stands for."""


@dataclass(frozen=True)
class GridOptions:
    """Which model answers what; whatever is not given is the grid file's."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="'pico' (bundled), a Hub id or a folder.")] = None
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the best one by default.")] = None
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None
    device_map: Annotated[str | None, typer.Option(help="Spread a large model over devices: auto, balanced.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint.")] = None
    quantize: Annotated[str | None, typer.Option(help="Load the weights quantised: 4bit or 8bit.")] = None
    processor: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of the processor; may be repeated.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False
    engine: Annotated[str | None, typer.Option(help="hf, graph (a captured step, replayed), or auto.")] = None
    images: Annotated[
        str | None, typer.Option(help="Folder of the pictures, or scenes:SPLIT[:PICTURES], drawn on the spot.")
    ] = None
    option: Option = None
    protocol: Annotated[str | None, typer.Option(help="Picture protocol: hf (as shipped) or paper.")] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Items answered together.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each benchmark.")] = None
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of answers and tables; a run goes on in it.")] = Path(
        "results"
    )

    def grid(self, target: str, **given: Any) -> Grid:
        """The grid of a file or of benchmark names, with what the command line says put over it.

        Args:
            target: TOML file, benchmark names with commas between, or scenes[:SPLIT[:PICTURES]].
            given: further fields of the grid; None for those not given.
        """
        from vlmfix.eval import drawn, grid

        own = ("model", "images", "protocol", "batch_size", "limit")
        given |= {name: getattr(self, name) for name in own}
        if target.endswith(".toml"):
            found = grid.read(target)
        elif drawn.parse(target):
            given["images"] = given["images"] or target
            found = grid.parse({"benchmarks": list(ON_SCENES)})
        else:
            found = grid.parse({"benchmarks": [name.strip() for name in target.split(",") if name.strip()]})
        given["load"] = {**found.load, **self.loading()}
        found = dataclasses.replace(found, **{key: value for key, value in given.items() if value is not None})
        found = drawn.filled(found)
        return dataclasses.replace(found, benchmarks=with_options(found.benchmarks, self.option))

    def opener(self, grid: Grid, recipes: Iterable[str]) -> Opener:
        """What loads the grid's model.

        Args:
            grid: the grid.
            recipes: texts of all recipes that will be answered.

        Raises:
            UsageError: a wrong name, key or value in a recipe.
        """
        from vlmfix.eval.answerer import Opener

        return Opener(grid.model, recipes=list(recipes), **grid.load)

    def loading(self) -> dict[str, Any]:
        """Keywords of `vlmfix.load` that were given."""
        names = ("device", "dtype", "device_map", "revision", "quantize", "engine")
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.processor:
            chosen["processor_kwargs"] = key_values(self.processor)
        return chosen | ({"trust_remote_code": True} if self.trust_remote_code else {})


def with_options(given: Mapping[str, Mapping[str, Any]], pairs: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Benchmarks with options `KEY=VALUE` given to each that knows them, `BENCHMARK.KEY=VALUE` to one.

    Raises:
        UsageError: an option that none of them knows.
    """
    from vlmfix.eval import benchmarks

    found = {name: dict(options) for name, options in given.items()}
    known = {name: [field.name for field in dataclasses.fields(benchmarks.find(name))] for name in found}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--option {pair!r}: write KEY=VALUE, as in prompt=pai")
        name, _, option = key.strip().rpartition(".")
        takers = [each for each in found if name in ("", each) and option in known[each]]
        if not takers:
            every = sorted({each for names in known.values() for each in names})
            raise UsageError(f"--option {pair!r}: no such option{nearest(option, every)}")
        for each in takers:
            found[each][option] = value
    return found


class Telling:
    """Progress of the rows of a table on stderr, and the end of the time; use it as a context.

    Args:
        seconds: after which answering stops; None for no limit.
        quiet: whether nothing is shown.
    """

    def __init__(self, seconds: float | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        self._end = None if seconds is None else time.monotonic() + seconds
        self._shown: Progress | None = None

    def __enter__(self) -> Telling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if isinstance(error, KeyboardInterrupt | OutOfTime):
            note(f"{str(error) or 'stopped'}; the same command goes on from here", "bold")
            raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else SOME_FAILED) from None

    def __call__(self, name: str, done: int, total: int) -> None:
        """Takes the state of a row.

        Raises:
            OutOfTime: the seconds are over; what was answered is stored.
        """
        if not self.quiet:
            if self._shown is None or self._shown.name != name:
                self._close()
                self._shown = Progress(name, total)
                self._shown.__enter__()
            self._shown.add(done - self._shown.done, 0)
        if self._end is not None and time.monotonic() > self._end:
            raise OutOfTime("out of time")

    def _close(self) -> None:
        if self._shown is not None:
            self._shown.__exit__(None, None, None)
            self._shown = None


class OutOfTime(Exception):  # noqa: N818 - it is a wish of the user
    """The time that the user gave is over."""
