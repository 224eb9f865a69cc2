"""The command line: one file per command, imported when it is asked for."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vlmfix import __version__
from vlmfix.commands.console import SOME_FAILED, fail
from vlmfix.commands.options import spread
from vlmfix.errors import VlmfixError

COMMANDS = {
    "run": ("vlmfix.commands.run:run", "Answer prompts about a picture, a folder or a prompt file."),
    "compare": ("vlmfix.commands.compare:compare", "Answer one prompt with several recipes and show what changed."),
    "demo": ("vlmfix.commands.demo:demo", "Bundled model and pictures, with and without mitigation."),
    "profile": ("vlmfix.commands.profile:profile", "Time of the first and of each further token, per recipe."),
    "eval": ("vlmfix.commands.evaluate:evaluate", "Answer benchmarks and compare methods with greedy decoding."),
    "score": ("vlmfix.commands.score:score", "Score a file of answers; needs neither model nor GPU."),
    "frontier": ("vlmfix.commands.frontier:frontier", "Sweep a method's strength: hallucination against recall."),
    "tune": ("vlmfix.commands.tune:tune", "Choose hyper-parameters on the tuning split, the same chances for all."),
    "verify": ("vlmfix.commands.verify:verify", "Score a bundle of answers again and compare what it states."),
    "reproduce": ("vlmfix.commands.reproduce:reproduce", "Run a published table and judge it."),
    "bench": ("vlmfix.commands.bench:bench", "Print the results of the benchmarks of speed."),
    "methods": ("vlmfix.commands.methods:methods", "List the methods that recipes are made of."),
    "models": ("vlmfix.commands.models:models", "List the model families."),
    "env": ("vlmfix.commands.env:env", "Versions and devices."),
}
"""Name -> "module:function", help. A command is one line here and one file."""


class _Lazy(TyperGroup):
    """Lists commands from the table and imports one when it is invoked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, text) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=text))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command in place of its line in the table."""
        name, stub, rest = super().resolve_command(ctx, args)
        return name, None if stub is None else _command(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; an error that the user can mend becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except VlmfixError as error:
            raise typer.Exit(fail(error)) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            reason = VlmfixError(f"the output cannot be written: {error.strerror}; make room and start again")
            raise typer.Exit(fail(reason, SOME_FAILED)) from error


def _command(name: str) -> Any:
    module, _, function = COMMANDS[name][0].partition(":")
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(spread(getattr(importlib.import_module(module), function)))
    return typer.main.get_command(single)


app = typer.Typer(
    cls=_Lazy,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Vision-language models hallucinate less while they decode, without training.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vlmfix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `vlmfix`: exit code 0 all answered, 1 some failed, 2 wrong usage."""
    # On a busy machine, torch's threads that wait actively for each other make a CPU run ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(arguments)
