"""One row of the engines' benchmark: the model, a way to generate, its times and memory."""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import vlmfix
from benchmarks.engine_cases import BASELINES, STATIC, TWO, Case
from benchmarks.shapes import SHAPES, build, prompt
from benchmarks.timing import clock, copy_rate, two_forwards, wait

SLOW = 3.0
"""A row whose timed calls took this many seconds is not repeated."""

PACE = 10
"""Answers from which it is told how many more fit in the time."""

Run = Callable[[int, dict[str, Any]], Any]


@dataclass
class Bench:
    """The model and what is measured on it.

    Args:
        name: of the shape.
        options: of the command line.
    """

    name: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available() and self.name != "cpu"
        self.device = "cuda" if on_gpu else "cpu"
        self.rate = copy_rate(self.device)
        self.model = build(self.name, self.device)
        self.forget()
        self._cell: tuple[int, int] | None = None
        self.resident = torch.cuda.memory_allocated() if on_gpu else 0

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return self.device == "cuda"

    def forget(self) -> None:
        """Frees what a row left behind on the GPU."""
        if self.gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def opened(self, case: Case) -> Iterator[tuple[Run, Callable[[], dict[str, Any]]]]:
        """A way to generate, and the report of what ran; the model is restored behind it."""
        if case.name == TWO:
            yield lambda new, inputs: two_forwards(self.model, new, inputs), dict
        elif case.name in BASELINES:
            attention, settings = BASELINES[case.name]
            self.model.set_attn_implementation(attention)
            try:
                yield (lambda new, x: self.model.generate(**x, max_new_tokens=new, do_sample=False, **settings)), dict
            finally:
                self.model.set_attn_implementation("sdpa")
                if case.name == STATIC:
                    self._forget_compiled()
        else:
            engine, _, compiled = case.engine.partition("+")
            vlm = vlmfix.wrap(self.model, None, case.recipe, engine=engine, **({"compile": True} if compiled else {}))
            try:
                yield lambda new, inputs: vlm.generate(**inputs, max_new_tokens=new), lambda: vlm.report
            finally:
                vlm.close()
                if compiled:
                    self._forget_compiled()

    def _forget_compiled(self) -> None:
        for name in ("_cache", "_previous_max_cache_length", "_compiled_call", "_last_compile_config"):
            self.model.__dict__.pop(name, None)
        torch.compiler.reset()

    def row(self, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measures a row, and seconds to first answers where they are asked for."""
        given = itertools.cycle(self._inputs(case.batch, case.prompt))
        before = 0
        if self.gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        answers: dict[str, Any] = {}
        begun = time.perf_counter()
        with self.opened(case) as (generate, report):

            def ran(new: int) -> Any:
                return generate(new, next(given))

            if self._answers(case):
                answers = self._first_answers(ran, report, begun)
            found = self._times(case, ran, report)
        if self.gpu and "ms_per_token" in found:
            found["peak_gib"] = (self.resident + torch.cuda.max_memory_allocated() - before) / 2**30
        return found, answers

    def _inputs(self, batch: int, length: int) -> list[dict[str, Any]]:
        """Batches that differ in their pictures; those of the last cell are kept."""
        if self._cell != (batch, length):
            self._given = [prompt(self.name, batch, length, self.device, seed) for seed in (1, 2, 3)]
            self._cell = batch, length
        return self._given

    def _answers(self, case: Case) -> bool:
        usual = SHAPES[self.name].prompts[0], SHAPES[self.name].batches[0]
        plain = case.plain or case.name == STATIC or (case.name == "greedy" and case.engine == "graph+compile")
        asked = bool(self.options.answers) and (case.prompt, case.batch) == usual and not case.again
        return asked and plain and case.engine != "hf"

    def _first_answers(self, generate: Callable[[int], Any], report: Any, begun: float) -> dict[str, Any]:
        out: dict[str, Any] = {}
        wanted, limit = sorted(self.options.answers), self.options.answer_seconds
        first = pace = 0.0
        for number in range(1, wanted[-1] + 1):
            generate(self.options.answer_tokens)
            wait(self.device)
            spent = time.perf_counter() - begun
            if number == 1:
                first = spent
                out["capture_seconds"] = engine_of(report()).get("capture_seconds")
            else:
                out["seconds_per_answer"] = pace = (spent - first) / (number - 1)
            if number in wanted:
                out[str(number)] = spent
            goal = min((n for n in wanted if n > number), default=number)
            if goal > number and (spent > limit or (number >= PACE and spent + (goal - number) * pace > limit)):
                return {**out, "note": f"{number} answers in {spent:.0f} s, {goal} do not fit in {limit:g} s"}
        return out

    def new(self, case: Case) -> tuple[int, int]:
        """Tokens of a short and a long call: half as far apart where a step has to be launched operation by operation.

        Such a step takes several times as long, so that fewer of them are timed as well.
        """
        short, long = self.options.new
        recorded = case.engine.startswith("graph") or case.name == STATIC
        return short, long if recorded else (short + long) // 2

    def _times(self, case: Case, generate: Callable[[int], Any], report: Any) -> dict[str, Any]:
        short, long = self.new(case)
        first = clock(lambda: generate(long), self.device)
        used = engine_of(report())
        found: dict[str, Any] = {"first_call_s": first}
        wanted = case.engine.partition("+")[0]
        if wanted == "graph" and used.get("name") != "graph":
            return {"note": f"ran in engine {used.get('name', 'hf')}: {used.get('reason', 'no reason given')}"}
        if wanted == "graph":
            found |= {"capture_seconds": used.get("capture_seconds"), "form": used.get("form")}
            if "compile" in case.engine and used.get("form") != "compiled":
                found["note"] = f"blocks were not compiled: {used.get('reason', self.device)}"
            if not used.get("captured"):
                found["note"] = f"steps were not captured: {used.get('reason', self.device)}"
        if case.name.startswith("opera"):
            found["returns"] = report()["methods"]["opera"].get("returns")
        short_times: list[float] = []
        long_times: list[float] = []
        anew = 0
        begun = time.perf_counter()
        while not long_times or (len(long_times) < self.options.repeats and time.perf_counter() - begun < SLOW):
            for new, times in ((short, short_times), (long, long_times)):
                times.append(clock(partial(generate, new), self.device))
                anew += engine_of(report()).get("reused") is False
        if anew:
            found["note"] = f"{anew} of {2 * len(long_times)} timed calls set a step up anew"
        token = (min(long_times) - min(short_times)) / (long - short)
        return found | {
            "prefill_ms": 1e3 * (min(short_times) - (short - 1) * token),
            "ms_per_token": 1e3 * token,
            "spread_ms": 1e3 * (max(long_times) - min(long_times)) / (long - short),
            "repeats": len(long_times),
            "new": [short, long],
        }


def engine_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says of the engine."""
    return dict(report.get("engine") or {})
