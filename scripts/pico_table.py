"""The table of every registered method on the bundled model, in two steps that may run on different machines.

    python scripts/pico_table.py answer --out FOLDER [--processes 8] [--seconds 480] [--limit 8]
    python scripts/pico_table.py table FOLDER/answers-*.jsonl.gz --out docs/results

The first answers benchmarks/pico.toml with several processes on one device and writes FOLDER/answers-N.jsonl.gz; it
needs torch, transformers and pillow, and no installation. When the time is over it packs what it has; with
--keep DIR the same command goes on later, with --have FILES on another machine. The second scores these files and needs
no GPU; pico_BENCHMARK_pairs.md compares rows with other rows than greedy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vlmfix  # noqa: E402 - the path above comes first, here and below

if importlib.util.find_spec("vlmfix.eval") is None:  # a bare checkout; installed, eval/ is vlmfix.eval
    vlmfix.__path__.append(str(ROOT))

from vlmfix.eval import (  # noqa: E402
    baselines,
    benchmarks,
    bundle,
    compare,
    drawn,
    grid,
    judge,
    packed,
    pipeline,
    stats,
    suite,
)
from vlmfix.eval import table as tables  # noqa: E402
from vlmfix.eval.baselines import Arm  # noqa: E402
from vlmfix.eval.collect import Answered, row  # noqa: E402

GRID = ROOT / "benchmarks" / "pico.toml"
EARLY = ("greedy", *grid.FIRST)
LATE = ("sgrs", "carve", "patches", "opera")
"""Rows that cost far more than others; the last one waits for everything else."""
SAMPLED = "sampling: "
SIZE = 4 << 20
"""Bytes of a file of packed answers."""
GRACE = 20.0
"""Seconds that a process has after its time to end its batch."""
PAIRS = """# pico, {name}: rows against other rows than greedy

How much of a sampled gain is the plausibility mask, and what a method has beyond its placebo and beyond the trivial
bias of the end token.

"""


class OutOfTime(Exception):  # noqa: N818 - it is a wish, not a fault
    """The time that was given is over."""


def main() -> int:
    """One of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("answer")
    one.add_argument("--out", type=Path, required=True, help="folder of the packed answers")
    one.add_argument("--keep", type=Path, help="folder of the answers as they come; a temporary one by default")
    one.add_argument("--processes", type=int, default=1, help="processes that share the device")
    one.add_argument("--seconds", type=float, default=1e9, help="stop answering after this time")
    one.add_argument("--have", type=Path, nargs="+", help="packed answers of an earlier run, which then goes on")
    one.add_argument("--child", type=float, help=argparse.SUPPRESS)
    two = steps.add_parser("table")
    two.add_argument("files", type=Path, nargs="+", help="packed answers")
    two.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    for step in (one, two):
        step.add_argument("--grid", type=Path, default=GRID)
        step.add_argument("--limit", type=int, help="only the first items")
        step.add_argument("--methods", help="other recipes than the grid's, with ; between")
    options = parser.parse_args()
    if options.step == "table":
        return table(options)
    return answer(options) if options.child is not None else share(options)


def chosen(options: argparse.Namespace) -> grid.Grid:
    """The grid with what the command line says put over it, scenes drawn."""
    found = grid.read(options.grid)
    if options.methods:
        found = replace(found, methods=grid.parse({"benchmarks": ["text"], "methods": options.methods}).methods)
    return drawn.filled(replace(found, limit=options.limit or found.limit))


def arms(plan: grid.Grid, name: str) -> list[Arm]:
    """The rows of a benchmark; every contrastive method also sampled, to stand beside sampling and its mask alone."""
    captions = benchmarks.load(name, **plan.benchmarks[name]).max_new_tokens > suite.SHORT
    found = grid.arms(plan, captions, contrasts := grid.contrastive())
    sampled = {
        arm.name: Arm(f"{SAMPLED}{arm.name}", "method", arm.recipe, settings=baselines.SAMPLING)
        for arm in found
        if arm.kind == "method" and set(baselines.methods_of(arm.recipe)) & set(contrasts)
    }
    return [row for arm in found for row in (arm, sampled.get(arm.name)) if row]


def stages(plan: grid.Grid) -> list[tuple[str, list[Arm]]]:
    """Benchmarks with parts of their rows, what matters most first: a table cut off by the clock is still one."""
    wishes: list[Any] = [
        lambda arm: arm.name in EARLY,
        lambda arm: arm.kind == "method" and arm.name not in (*EARLY, *LATE) and not arm.name.startswith(SAMPLED),
        lambda arm: arm.kind == "control",
        lambda arm: arm.name.startswith(SAMPLED),
        lambda arm: arm.kind == "baseline",
        lambda arm: arm.name in LATE[:-1],
        lambda arm: arm.kind == "placebo",
        lambda arm: arm.name in LATE[-1:],
    ]
    made = [(name, [arm for arm in arms(plan, name) if wish(arm)]) for wish in wishes for name in plan.benchmarks]
    return [(name, rows) for name, rows in made if rows]


def share(options: argparse.Namespace) -> int:
    """Starts the processes, waits for them and packs what they answered."""
    started = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        environment = os.environ | {"VLMFIX_CACHE": os.environ.get("VLMFIX_CACHE", str(keep / "cache"))}
        os.environ["VLMFIX_CACHE"] = environment["VLMFIX_CACHE"]
        chosen(options)
        if options.have:
            say([f"{packed.unpack(options.have, keep / 'answers')} runs that were there before"])
        threads = str(max(1, (os.cpu_count() or 1) // options.processes))
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", str(started)]
        command += [] if options.keep else ["--keep", str(keep)]
        running = []
        for rank in range(options.processes):
            world = {"RANK": rank, "WORLD_SIZE": options.processes, "LOCAL_RANK": rank, "OMP_NUM_THREADS": threads}
            own = environment | {key: str(value) for key, value in world.items()}
            with (options.out / f"log-{rank}.txt").open("w") as log:
                running.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        codes = [ended(process, started + options.seconds + GRACE) for process in running]
        say((options.out / "log-0.txt").read_text().splitlines()[-40:])
        files = packed.pack(keep / "answers", options.out, SIZE, options.processes)
        about = {"seconds": round(time.time() - started, 1), "processes": options.processes, "device": device_name()}
        text = json.dumps({**about, "codes": codes, "versions": bundle.versions()}, indent=1)
        (options.out / "environment.json").write_text(text + "\n")
        say([text, *(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in files)])
    return max(map(abs, codes))


def ended(process: subprocess.Popen[bytes], last: float) -> int:
    """A process's exit status; one that is still in its batch at the time `last` is killed and loses that batch."""
    try:
        return process.wait(max(0.0, last - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def answer(options: argparse.Namespace) -> int:
    """One process: its share of every row, until the time is over."""
    from vlmfix.eval.answerer import Opener

    plan, end = chosen(options), options.child + options.seconds

    def progress(name: str, done: int, total: int) -> None:
        if time.time() > end:
            raise OutOfTime

    opener = Opener(plan.model, **plan.load, device="cuda" if device_name() != "cpu" else "cpu")
    try:
        for name, rows in stages(plan):
            runs, refused = pipeline.answer(plan, name, rows, opener, options.keep, progress=progress)
            outcomes = {run.arm.name: run.outcome for run in runs if run.outcome}
            say([f"{name} {row}: {o.seconds:.1f} s, {o.failed} failed" for row, o in outcomes.items()])
            say([f"{name} {row} REFUSED: {reason}" for row, reason in refused.items()])
            say([f"{time.time() - options.child:.0f} s since the start"])
    except OutOfTime:
        say([f"out of time after {time.time() - options.child:.0f} s"])
        return 3
    return 0


def table(options: argparse.Namespace) -> int:
    """Scores packed answers and writes one table a benchmark, as Markdown and JSON."""
    plan = chosen(options)
    told = options.files[0].with_name("environment.json")
    made = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packed.unpack(options.files, Path(scratch) / "answers")
        for name in plan.benchmarks:
            result = pipeline.table(plan, name, arms(plan, name), None, scratch)
            assert result is not None
            columns = [column for column in plan.columns if column in result.comparison.metrics]
            text = tables.markdown(tables.build(result.comparison, columns))
            (options.out / f"pico_{name}.md").write_text(
                head(name, result.comparison.pictures, made) + text, encoding="utf-8"
            )
            (options.out / f"pico_{name}.json").write_text(tables.as_json(result.comparison), encoding="utf-8")
            say([f"{options.out / f'pico_{name}.md'}: {len(result.rows)} rows, {len(result.missing)} missing"])
            text, figures = beside(benchmarks.load(name, **plan.benchmarks[name]), result.rows, columns)
            (options.out / f"pico_{name}_pairs.md").write_text(PAIRS.format(name=name) + text, encoding="utf-8")
            found = json.dumps(figures, indent=1) + "\n"
            (options.out / f"pico_{name}_pairs.json").write_text(found, encoding="utf-8")
    return 0


def pairs(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Rows to set side by side besides each with greedy: (row, against, what the difference is)."""
    found = []
    for method, strength in grid.contrastive().items():
        off = baselines.with_value(method, method, strength, baselines.NO_CONTRAST[strength])
        mask, both = f"sampling + mask: {off}", f"{SAMPLED}{method}"
        found += [(mask, "sampling", "the mask alone"), (both, "sampling", "mask and contrast")]
        found += [(both, mask, "the contrast beyond its mask")]
        found += [(method, "end bias 1", "beyond a bias of the end token")]
    for placebo in (name for name in names if " [placebo: " in name):
        found.append((placebo.partition(" [")[0], placebo, "beyond its placebo"))
    return [pair for pair in found if {pair[0], pair[1]} <= set(names)]


def beside(
    benchmark: benchmarks.Benchmark, answered: Sequence[Answered], columns: Sequence[str]
) -> tuple[str, list[dict[str, Any]]]:
    """The paired differences of `pairs`, Holm's correction over all of them: Markdown, and every figure."""
    known = {each.name: each for each in answered}
    same: dict[Any, tuple[str, str, str]] = {}
    notes, kept = dict[str, list[str]](), list[tuple[str, str, str]]()
    for pair in pairs(list(known)):
        texts = tuple(tuple(str(record["text"]) for record in known[name].answers[0]) for name in pair[:2])
        first = same.setdefault(texts, pair)
        if first is pair:
            kept.append(pair)
        else:
            notes.setdefault(first[0], []).append(pair[0])
    scores = {name: row(benchmark, known[name]).score for name in {name for pair in kept for name in pair[:2]}}
    tested = [name for name in columns if judge.direction(name)]
    draws = max(compare.DRAWS, 80 * len(tested) * len(kept))
    gaps = [stats.paired(scores[b], scores[a], metrics=columns, draws=draws) for a, b, _ in kept]
    adjusted = iter(stats.holm([gap[name].p for gap in gaps for name in tested]))
    rows, figures = [], []
    for pair, gap in zip(kept, gaps, strict=True):
        entries = [tables.Entry(text) for text in pair]
        for name in columns:
            d, p = gap[name], next(adjusted) if name in tested else 1.0
            sure = p < 0.05 and abs(d.difference) >= d.detectable
            verdict = ("better" if d.difference * judge.direction(name) > 0 else "worse") if sure else ""
            entries.append(tables.Entry(f"{d.difference:+.1f}", f"[{d.low:+.1f}, {d.high:+.1f}]", verdict))
        rows.append(entries)
        figures.append({"row": pair[0], "against": pair[1], "shows": pair[2]})
        figures[-1] |= {name: asdict(each) for name, each in gap.items()}
    count = len(tested) * len(kept)
    told = (
        "differences, row minus the one it stands against, with 95% bootstrap intervals over pictures; bold: better, "
        f"†: worse, by sign-flip tests over pictures after Holm's correction of {count} tests, and not below the "
        "smallest detectable difference"
    )
    twins = [f"the same answers as {first}: {', '.join(others)}" for first, others in notes.items()]
    made = tables.Table("", ["row", "against", "shows", *columns], rows, [told, *twins], [])
    return tables.markdown(made).partition("\n\n")[2], figures


def head(name: str, pictures: int, made: dict[str, Any]) -> str:
    """What stands above a table."""
    versions = made.get("versions", {})
    where = f"{made.get('device', 'unknown device')}, torch {versions.get('torch')}, transformers "
    where += f"{versions.get('transformers')}, float32"
    return (
        f"# pico on {pictures:,} shifted scenes: {name}\n\n"
        "Every registered method at its defaults, settings of the checkpoint's preset included, on the bundled model. "
        "pico is a test bed and a demonstration: these figures say nothing about large models. Cost columns are those "
        f"of a batch on a shared device and compare rows of this table only.\n\nAnswered on {where}. Made by "
        "`python scripts/pico_table.py`, see there; every figure is also in the JSON file beside this one.\n\n"
    )


def device_name() -> str:
    """The accelerator's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def say(lines: Sequence[str]) -> None:
    """Prints lines at once."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
