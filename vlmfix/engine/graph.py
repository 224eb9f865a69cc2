"""The engine that replays one captured step: which calls it takes, its sessions, its loop."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from vlmfix.attention.compiled import Compiled
from vlmfix.attention.request import Request
from vlmfix.engine.fitting import addresses, lacking, numbers, why_not
from vlmfix.engine.forms import Form, forms
from vlmfix.engine.sessions import Session
from vlmfix.errors import UsageError
from vlmfix.hf import hooks, slots, stepping
from vlmfix.hf.parts import Parts
from vlmfix.hf.settings import effective
from vlmfix.hf.stepping import Choice, Prefilled, Task

ENGINES = ("auto", "hf", "graph")
PATIENCE = 8
"""Steps between two looks at whether all sequences have ended."""

BUCKET = 32
"""Capacities are multiples of it, so that prompts of similar length share a captured step."""

ROOMY = 2
"""A captured step serves prompts that need this part of its capacity, so that few are captured where lengths vary."""

KEPT = 2
"""Captured steps that are kept; each holds a cache."""

FEWEST = 8
"""Answers shorter than this are not worth capturing a step for."""


class Unfit(Exception):  # noqa: N818 - it is an answer, not a fault
    """The cache cannot be one of fixed size; the message says why."""


class Engine:
    """Chooses how one model decodes: in transformers' loop, or by replaying a captured step.

    Args:
        kind: "hf", "graph", or "auto" for the second on a GPU and the first elsewhere.
        compile: whether decoder blocks go through torch.compile before a step is captured.

    Raises:
        UsageError: no such engine.
    """

    def __init__(self, kind: str = "auto", compile: bool = False) -> None:
        if kind not in ENGINES:
            raise UsageError(f"engine={kind!r}: give {', '.join(map(repr, ENGINES))}")
        if compile and kind == "hf":
            raise UsageError("compile=True: only captured steps are compiled; choose engine='graph' or 'auto'")
        self.kind, self.compile = kind, compile
        self._forms: tuple[Form, ...] = ()
        self._weights: Hashable = None
        self._sessions: OrderedDict[tuple[Hashable, int], Session] = OrderedDict()
        self._unfit = ""
        self._lock = threading.Lock()
        self._running: int | None = None
        self.report: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins without captured steps, which hold addresses."""
        return Engine, (self.kind, self.compile)

    def close(self) -> None:
        """Frees captured steps and their caches."""
        self._sessions.clear()

    def wanted(self, parts: Parts) -> bool:
        """Whether steps are captured where nothing speaks against it."""
        return self.kind == "graph" or (self.kind == "auto" and parts.device.type == "cuda")

    def worthwhile(self, parts: Parts, new: int | None) -> bool:
        """Whether so many new tokens are worth a captured step; None for as many as the model likes.

        The first token comes from reading the prompt, so one token alone takes no step.
        """
        fewest = 2 if self.kind == "graph" else FEWEST
        return self.wanted(parts) and (new is None or new >= fewest)

    def generate(
        self,
        parts: Parts,
        compiled: Compiled,
        generate: Callable[..., Any],
        run: Callable[[Callable[..., Any]], Any],
        kwargs: dict[str, Any],
        watched: bool,
    ) -> Any:
        """One call of generate.

        Args:
            parts: the model.
            compiled: the recipe.
            generate: the model's generate in transformers' loop.
            run: runs a generate under the recipe.
            kwargs: the caller's keywords.
            watched: whether observers read along.
        """
        if not self.wanted(parts):
            self.report = {"name": "hf"}
            if self.compile:
                self.report["reason"] = f"compile=True: engine='auto' compiles no steps on {parts.device.type}"
                hooks.warn_once(f"{self.report['reason']}; choose engine='graph' for that, or leave it out")
            return run(generate)
        reason = self._unfit or why_not(parts, compiled, kwargs, watched, self.kind == "auto")
        if self._running == threading.get_ident():
            reason = "it is called from within another generation"
        new = effective("max_new_tokens", kwargs, parts.model.generation_config)
        if not reason and not self.worthwhile(parts, new):
            self.report = {"name": "hf", "reason": f"max_new_tokens={new} is not worth capturing a step"}
            return run(generate)
        loop = generate
        if not reason:
            try:
                return run(lambda **given: stepping.call(generate, lambda task: self._loop(parts, task), given))
            except Unfit as unfit:
                reason, loop = str(unfit), lambda **given: stepping.again(generate, given)
        level = logging.WARNING if self.kind == "graph" else logging.INFO
        hooks.warn_once(f"decoding runs in transformers' loop (engine 'hf'): {reason}", level)
        self.report = {"name": "hf", "reason": reason}
        return run(loop)

    def _loop(self, parts: Parts, task: Task) -> Any:
        request: Any = hooks.REQUEST.get()
        with self._lock:  # a session holds one generation at a time, and the prompt is read into its cache
            self._running = threading.get_ident()
            try:
                prefilled = self._prefilled(request, task)
                self._unfit = slots.why_not(prefilled.cache, parts.depth)
                if self._unfit:
                    raise Unfit(self._unfit)
                return self._decode(parts, request, task, prefilled)
            finally:
                self._running = None

    def _prefilled(self, request: Request, task: Task) -> Prefilled:
        """Reads the prompt, into the cache of a captured step with room for it if there is one."""
        needed = request.length + task.room
        likely = next((s for s in reversed(self._sessions.values()) if _serves(s, needed)), None)
        capacity, cache = (_capacity(needed), None) if likely is None else (likely.capacity, likely.frame.cache)
        slots.reserve(task.kwargs.get("past_key_values"), capacity, cache)
        return task.prefill()

    def _decode(self, parts: Parts, request: Request, task: Task, prefilled: Prefilled) -> Any:
        choice = Choice(task)
        valid, positions = request.standing(prefilled.valid)
        needed = valid.shape[1] + task.room
        session, reused = self._session(parts, request, task, choice, prefilled, positions.shape, needed)
        token, processed = choice.first(task, prefilled.logits)
        seconds = session.capture_seconds
        session.start(request, choice, prefilled, token)
        output = Output(task, session)
        output.note(prefilled.logits, processed)
        steps = 0
        while not output.over(steps + 1):
            session.step()
            if session.choice.pure:
                output.note(session.scores)
            else:
                drawn, processed = choice.later(output.ids(), session.scores)
                session.take(drawn)
                output.note(session.scores, processed)
            steps += 1
        request.steps = steps + 1  # a replay does not count
        self.report = {
            "name": "graph",
            "reused": reused,
            "steps": steps,
            "captured": session.captured,
            "form": session.form,
            "capture_seconds": session.capture_seconds - seconds,
            **({"reason": session.reason} if steps and session.reason else {}),
        }
        return output.result()

    def _session(
        self,
        parts: Parts,
        request: Request,
        task: Task,
        choice: Choice,
        prefilled: Prefilled,
        shape: torch.Size,
        needed: int,
    ) -> tuple[Session, bool]:
        """A session that fits, and whether it was made before."""
        ends = None if task.ends is None else tuple(task.ends.tolist())
        shapes = (len(prefilled.valid), shape, request.copies)
        weights = addresses(parts)
        key = (*shapes, ends, task.fill, choice.key, id(request.parts), weights, numbers(prefilled))
        place = next((at for at, s in reversed(self._sessions.items()) if at[0] == key and _serves(s, needed)), None)
        session = None if place is None else self._sessions.pop(place)
        reused = session is not None and session.fits(request)
        if session is None or not reused:
            session = None  # it holds a cache
            capacity = _capacity(needed)
            while len(self._sessions) >= KEPT or (self._sessions and lacking(prefilled, capacity)):
                self._sessions.popitem(last=False)
            if missing := lacking(prefilled, capacity):
                raise Unfit(f"a cache of {capacity} slots does not fit, {missing / 2**30:.1f} GiB are missing")
            if self._weights != weights:
                self._forms, self._weights = forms(parts, self.compile), weights
            session = Session(parts, request, task, choice, prefilled, capacity, self._forms)
        self._sessions[key, session.capacity] = session
        return session, reused


def _serves(session: Session, needed: int) -> bool:
    return needed <= session.capacity <= ROOMY * _capacity(needed)


def _capacity(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET


class Output:
    """What a loop has yielded so far, and when it is over.

    Args:
        task: the call.
        session: its step.
    """

    def __init__(self, task: Task, session: Session) -> None:
        self._task, self._session = task, session
        self._count = 0
        self._criteria = task.criteria
        self._scores: list[Tensor] = []
        self._logits: list[Tensor] = []

    def ids(self) -> Tensor:
        """[B, n] prompt and answer so far."""
        return torch.cat([self._task.ids, self._session.written(self._count)], 1)

    def note(self, logits: Tensor, processed: Tensor | None = None) -> None:
        """One more token was written.

        Args:
            logits: [B, V] it was chosen from.
            processed: [B, V] after the processors, where these ran outside the step.
        """
        self._count += 1
        config = self._task.config
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            raw = logits.clone()
            self._logits.append(raw)
            self._scores.append(raw if processed is None else processed.clone())
        if self._task.streamer is not None:
            self._task.streamer.put(self._session.last.cpu())
        if self._criteria:
            ids = self.ids()
            for criterion in self._criteria:
                self._session.end(criterion(ids, None))

    def over(self, count: int) -> bool:
        """Whether `count` tokens are enough; looks at the device now and then."""
        if count >= self._task.room:
            return True
        eager = self._task.streamer is not None or bool(self._criteria)
        return (eager or count == 1 or count % PATIENCE == 0) and self._session.ended

    def result(self) -> Any:
        """What generate returns."""
        if self._task.streamer is not None:
            self._task.streamer.end()
        new = self._session.written()
        scores, logits = (x[: new.shape[1]] for x in (self._scores, self._logits))
        return self._task.result(torch.cat([self._task.ids, new], 1), scores, logits)
