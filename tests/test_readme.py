"""What README.md shows works as it stands."""

import re
import subprocess
import sys
from pathlib import Path

from vlmfix.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_python_example_runs():
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4


def test_shown_commands_exist_and_have_output():
    shown = re.findall(r"```console\n\$ vlmfix (\w+) [^\n]*\n(.*?)```", README, re.S)
    assert shown
    for name, output in shown:
        assert name in COMMANDS
        assert len(output.strip()) > 20, f"run scripts/generate_docs.py --capture for {name}"


def test_linked_files_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text("utf-8")):
            assert (ROOT / target).exists(), target
