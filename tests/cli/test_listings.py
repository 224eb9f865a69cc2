"""Help and listings: complete, and without importing torch."""

import json
import subprocess
import sys

import pytest

from vlmfix import __version__, registry
from vlmfix.commands import COMMANDS
from vlmfix.hf.families import FAMILIES

HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"],
     ["methods"], ["methods", "var"], ["methods", "--json"], ["models"], ["models", "--json"],
     *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)  # fmt: skip
def test_no_torch(arguments):
    code = (
        "import sys; from vlmfix.commands import main\n"
        f"try:\n main({arguments!r})\nexcept SystemExit as stop:\n code = stop.code\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "0 []"
    assert done.stdout.strip()


def test_help_lists_every_command(vlmfix_says):
    text = " ".join(vlmfix_says("--help").stdout.split())
    for name, (_, summary) in COMMANDS.items():
        assert name in text
        assert summary.split(".")[0][:40] in text


def test_commands_have_no_hidden_options(vlmfix_says):
    from vlmfix.commands import _command

    for name in COMMANDS:
        command = _command(name)
        assert command.params, name
        for parameter in command.params:
            assert not getattr(parameter, "hidden", False), (name, parameter.name)
            assert parameter.help, (name, parameter.name)


def test_version(vlmfix_says):
    assert vlmfix_says("--version").stdout == f"vlmfix {__version__}\n"


def test_methods(vlmfix_says):
    text = vlmfix_says("methods").stdout
    for row in registry.ROWS:
        assert row.name in text
        assert row.paper in text
    rows = json.loads(vlmfix_says("methods", "--json").stdout)
    assert [row["name"] for row in rows] == [row.name for row in registry.ROWS]
    one = vlmfix_says("methods", "vcd").stdout
    assert "alpha = 1.0" in one
    wrong = vlmfix_says("methods", "vdc")
    assert wrong.exit_code == 2
    assert "did you mean vcd" in wrong.stderr


def test_env(vlmfix_says):
    facts = json.loads(vlmfix_says("env", "--json").stdout)
    assert facts["vlmfix"] == __version__
    assert facts["torch"] != "not installed"
    assert "transformers" in vlmfix_says("env").stdout


def test_unknown_command_names_the_nearest(vlmfix_says):
    result = vlmfix_says("compre")
    assert result.exit_code == 2
    assert "compare" in result.stderr


def test_models(vlmfix_says):
    listed = vlmfix_says("models")
    assert "qwen2_5_vl" in listed.stdout
    assert "untested: --all lists them" in listed.stderr
    rows = json.loads(vlmfix_says("models", "--all", "--json").stdout)
    assert [row["name"] for row in rows] == list(FAMILIES)
    assert "min_transformers: " in vlmfix_says("models", "llava").stdout
    wrong = vlmfix_says("models", "lava")
    assert wrong.exit_code == 2
    assert "did you mean llava" in wrong.stderr


def test_models_break_no_words_at_80_columns(vlmfix_says, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = vlmfix_says("models", "--all")
    lines = said.stdout.splitlines()
    assert lines[0].split() == ["family", "branches", "captured", "step", "status"]
    assert "refused: generates" in said.stdout
    assert "not shown for want of" in said.stderr
    known = {
        word for row in FAMILIES.values() for word in f"{row.name} {row.branches} {row.replayed} {row.status}".split()
    }
    assert {word for line in lines[1:] for word in line.split()} <= known
