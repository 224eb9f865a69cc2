"""Tests and times the kernels on the GPU of this machine, from a checkout, in one command.

    python scripts/gpu_check.py FOLDER [--sweep] [--no-flex] [--seconds 470]

Writes FOLDER/gpu_tests.log, FOLDER/kernels.json, FOLDER/kernels.log and with --sweep FOLDER/sweep.json. FOLDER is $OUT
if that is set and nothing else is given. The exit code is 0 only if every test passed and every case got a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], log: Path, seconds: float) -> int:
    """Runs a command from the checkout with its output in the log, and shows the log's end. 124 if out of time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=max(1.0, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    sys.stdout.write("\n".join(log.read_text().splitlines()[-90:]) + "\n")
    return code


def main() -> int:
    """Tests, then times, each within its share of the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT", "gpu_check")))
    parser.add_argument("--sweep", action="store_true", help="also tries launch configurations")
    parser.add_argument("--no-flex", action="store_true", help="leaves out FlexAttention, which compiles for long")
    parser.add_argument("--no-tests", action="store_true", help="leaves out the tests")
    parser.add_argument("--only", default="", help="only benchmark cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=470, help="time for everything")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    end, codes = time.monotonic() + options.seconds, {}
    python = [sys.executable]
    if not options.no_tests:
        tests = [
            *python,
            "-m",
            "pytest",
            "tests/kernels",
            "-m",
            "gpu",
            "-q",
            "--durations=10",
            "-p",
            "no:cacheprovider",
        ]
        if importlib.util.find_spec("xdist"):
            tests += ["-n", str(min(14, os.cpu_count() or 1))]
        codes["tests"] = run(tests, options.folder / "gpu_tests.log", end - time.monotonic())
    only = ["--only", options.only] if options.only else []
    times = [*python, "-m", "benchmarks.kernels", "--out", str(options.folder.resolve() / "kernels.json"), *only]
    times += ["--no-flex"] if options.no_flex else []
    codes["times"] = run(times, options.folder / "kernels.log", end - time.monotonic())
    if options.sweep:
        sweep = [*python, "-m", "benchmarks.kernel_sweep", "--out", str(options.folder.resolve() / "sweep.json"), *only]
        sweep += ["--jobs", str(min(14, os.cpu_count() or 1)), "--seconds", str(end - time.monotonic() - 10)]
        codes["sweep"] = run(sweep, options.folder / "sweep.log", end - time.monotonic())
    sys.stdout.write(f"exit codes: {codes}\n")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
