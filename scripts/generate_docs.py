"""Writes README.md, docs/cli.md and docs/families.md from the registry, the family table and the real --help.

    python scripts/generate_docs.py            # write
    python scripts/generate_docs.py --check    # exit code 1 if a file is not what would be written
    python scripts/generate_docs.py --capture  # first run the commands that README.md shows, and keep their output

In docs/templates/README.md, {{methods}}, {{families}}, {{speed}}, {{gpu}} and {{output NAME}} stand for what is
filled in.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from vlmfix.commands import COMMANDS, app
from vlmfix.commands import models as models_command
from vlmfix.hf.families import FAMILIES
from vlmfix.registry import ROWS

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "output"
WIDTH = 100

CAPTURED = {
    "run": 'vlmfix run examples/scenes/images --prompt "Describe the image." --method vcd --limit 2',
    "compare": 'vlmfix compare examples/scenes/images/000001.png "Describe the image." --methods "greedy; var; vcd"',
    "demo": "vlmfix demo --show 2",
}
"""Name of an output -> the command that makes it."""

MEASURED = ROOT / "benchmarks" / "results" / "h200_engine_llava.json"
SPEED = (
    *("transformers sdpa", "transformers static cache, compiled", "two sequential forwards"),
    *("graph greedy", "graph var", "graph gift", "graph vhr", "graph vcd", "graph sgrs", "graph+compile greedy"),
)
"""Rows of what was measured that README.md shows, the one to compare with first."""
AGAIN = ", again"
"""What the name of a row continues with that a run measured once more."""


def main() -> int:
    """Writes or checks the files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    parser.add_argument("--capture", action="store_true", help="run the commands whose output README.md shows")
    options = parser.parse_args()
    if options.capture:
        capture()
    stale = []
    for path, text in generated().items():
        if options.check:
            stale += [path] if not path.exists() or path.read_text("utf-8") != text else []
        else:
            path.write_text(text, "utf-8")
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: run `make docs`\n")
    return 1 if stale else 0


def generated() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        ROOT / "README.md": readme(),
        ROOT / "docs" / "cli.md": command_page(),
        ROOT / "docs" / "families.md": family_page(),
    }


def readme() -> str:
    """The template with its places filled in."""
    text = (ROOT / "docs" / "templates" / "README.md").read_text("utf-8")
    tested = sum(family.status == "tested" for family in FAMILIES.values())
    text = text.replace("{{methods}}", method_table()).replace("{{families}}", str(tested))
    text = text.replace("{{speed}}", speed_table()).replace("{{gpu}}", speed()["runs"][-1]["device"])
    return re.sub(r"\{\{output (\w+)\}\}", lambda match: shown(match[1]), text)


def shown(name: str) -> str:
    """A command and its captured output as a code block."""
    output = (OUTPUT / f"{name}.txt").read_text("utf-8").rstrip()
    return f"```console\n$ {CAPTURED[name]}\n{output}\n```"


def method_table() -> str:
    """The registry as a table."""
    rows = []
    for row in ROWS:
        source = f"[{row.title}](https://arxiv.org/abs/{row.paper})" if row.paper else row.title
        rows.append([f"`{row.name}`", row.kind, row.summary, row.cost, row.evidence, source])
    return markdown(["method", "kind", "what it does", "extra work per token", "evidence", "paper"], rows)


def speed_table() -> str:
    """Milliseconds per token of the usual prompt at batch 1, the mean of all measurements of the last run of a row."""
    cell = [r for r in speed()["rows"] if (r["prompt"], r["batch"]) == (640, 1) and "ms_per_token" in r]
    means: dict[str, float] = {}
    cells = []
    for name in SPEED:
        same = [row for row in cell if row["row"].partition(AGAIN)[0] == name]
        run = max(row["run"] for row in same)
        means[name] = statistics.mean(row["ms_per_token"] for row in same if row["run"] == run)
        earlier = " (earlier run)" if run < max(row["run"] for row in cell) else ""
        cells.append((name + earlier, f"{means[name]:.1f}", f"{means[name] / means[SPEED[0]]:.2f}"))
    return markdown(["", "ms per token", f"x {SPEED[0]}"], cells)


def speed() -> dict[str, Any]:
    """What was measured."""
    return dict(json.loads(MEASURED.read_text("utf-8")))


def family_page() -> str:
    """The table of families."""
    head = "# Model families\n\nGenerated from `vlmfix/hf/families.py`, which the tests read too.\n\n"
    return head + markdown(models_command.COLUMNS, map(models_command.cells, FAMILIES.values())) + "\n"


def command_page() -> str:
    """The help of every command."""
    parts = ["# Command line\n\nGenerated from `--help`.", section("vlmfix", [])]
    parts += [section(f"vlmfix {name}", [name]) for name in COMMANDS]
    return "\n\n".join(parts) + "\n"


def section(title: str, arguments: Sequence[str]) -> str:
    """A heading and the real help."""
    result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="vlmfix", terminal_width=WIDTH)
    if result.exit_code != 0:
        raise SystemExit(f"{title} --help failed: {result.output}")
    lines = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"## {title}\n\n```text\n{lines}\n```"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def capture() -> None:
    """Runs the commands of `CAPTURED` and keeps what they print on stdout."""
    OUTPUT.mkdir(exist_ok=True)
    for name, command in CAPTURED.items():
        words = shlex.split(command)
        words[0] = str(Path(sys.executable).parent / "vlmfix")
        environment = {**os.environ, "COLUMNS": str(WIDTH)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{command} failed:\n{done.stderr}")
        lines = (line.rstrip() for line in done.stdout.splitlines())
        (OUTPUT / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
