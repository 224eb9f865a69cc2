"""The engine that replays one captured step: which calls it takes, its sessions, its loop."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from vlmfix import registry
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.request import Request
from vlmfix.engine.forms import Form, forms
from vlmfix.engine.sessions import Session
from vlmfix.errors import UsageError
from vlmfix.hf import hooks, slots, stepping
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.parts import Parts
from vlmfix.hf.searching import FULL, SLIDING, layer_kinds
from vlmfix.hf.settings import effective
from vlmfix.hf.stepping import Choice, Prefilled, Task

ENGINES = ("auto", "hf", "graph")
PATIENCE = 8
"""Steps between two looks at whether all sequences have ended."""

BUCKET = 64
"""Capacities are multiples of it, so that prompts of similar length share a captured step."""

KEPT = 2
"""Captured steps that are kept; each holds a cache."""

FEWEST = 8
"""Answers shorter than this are not worth capturing a step for."""


class Unfit(Exception):  # noqa: N818 - it is an answer, not a fault
    """This model's cache cannot be one of fixed size; the message says why."""


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
        self._forms: tuple[Form, ...] | None = None
        self._sessions: OrderedDict[Hashable, Session] = OrderedDict()
        self._unfit = ""
        self._lock = threading.Lock()
        self.report: dict[str, Any] = {}

    def close(self) -> None:
        """Frees captured steps and their caches."""
        self._sessions.clear()

    def wanted(self, parts: Parts) -> bool:
        """Whether steps are captured where nothing speaks against it."""
        return self.kind == "graph" or (self.kind == "auto" and parts.device.type == "cuda")

    def worthwhile(self, parts: Parts, new: int | None) -> bool:
        """Whether so many new tokens are worth a captured step; None for as many as the model likes."""
        return self.wanted(parts) and (self.kind == "graph" or new is None or new >= FEWEST)

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
            return run(generate)
        reason = self._unfit or why_not(parts, compiled, kwargs, watched, self.kind == "auto")
        new = effective("max_new_tokens", kwargs, parts.model.generation_config)
        if not reason and not self.worthwhile(parts, new):
            self.report = {"name": "hf", "reason": f"{new} new tokens are not worth capturing a step"}
            return run(generate)
        if not reason:
            try:
                return run(lambda **given: stepping.call(generate, lambda task: self._loop(parts, task), given))
            except Unfit as unfit:
                reason = str(unfit)
        hooks.warn_once(f"decoding runs in transformers' loop (engine 'hf'): {reason}")
        self.report = {"name": "hf", "reason": reason}
        return run(generate)

    def _loop(self, parts: Parts, task: Task) -> Any:
        request: Any = hooks.REQUEST.get()
        prefilled = task.prefill()
        self._unfit = slots.why_not(prefilled.cache, parts.depth)
        if self._unfit:
            raise Unfit(self._unfit)
        with self._lock:  # a session holds one generation at a time
            return self._decode(parts, request, task, prefilled)

    def _decode(self, parts: Parts, request: Request, task: Task, prefilled: Prefilled) -> Any:
        choice = Choice(task)
        token, processed = choice.first(prefilled.logits)
        valid, positions = request.standing(prefilled.valid)
        capacity = -(-(valid.shape[1] + task.room) // BUCKET) * BUCKET
        session = self._session(parts, request, task, prefilled, positions.shape, capacity)
        session.start(request, task, prefilled, token)
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
        self.report |= {"steps": steps, "captured": session.captured, "form": session.form}
        self.report["capture_seconds"] = 0.0 if self.report["reused"] else session.capture_seconds
        if session.reason:
            self.report["reason"] = session.reason
        return output.result()

    def _session(
        self, parts: Parts, request: Request, task: Task, prefilled: Prefilled, shape: torch.Size, capacity: int
    ) -> Session:
        """A session that fits, captured before or new."""
        choice = Choice(task)
        ends = None if task.ends is None else tuple(task.ends.tolist())
        key = (len(prefilled.valid), shape, request.copies, capacity, ends, task.fill, choice.key)
        session = self._sessions.get(key)
        self.report = {"name": "graph", "reused": session is not None}
        if session is not None and session.fits(request):
            self._sessions.move_to_end(key)
            return session
        self.report["reused"] = False
        self._sessions.pop(key, None)
        while len(self._sessions) >= KEPT:
            self._sessions.popitem(last=False)
        if self._forms is None:
            self._forms = forms(parts, self.compile)
        self._sessions[key] = Session(parts, request, task, prefilled, capacity, self._forms)
        return self._sessions[key]


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


def why_not(parts: Parts, compiled: Compiled, kwargs: dict[str, Any], watched: bool, automatic: bool) -> str:
    """Why a call cannot replay a captured step; empty where it can.

    Args:
        parts: the model.
        compiled: the recipe.
        kwargs: the caller's keywords of generate.
        watched: whether observers read along.
        automatic: whether the caller left the choice open, so that the result must hold the cache too.
    """
    config = parts.model.generation_config

    def asked(name: str) -> Any:
        return effective(name, kwargs, config)

    family = FAMILIES.get(parts.family)
    if family is not None and family.replay:
        return f"{parts.family}: {family.replay}"
    others = sorted(set(layer_kinds(parts.text_config)) - {FULL, SLIDING})
    if others:
        return f"{parts.family} has layers of kind {', '.join(others)}"
    decoding = compiled.decoding
    if decoding is not None and decoding.search() is not None:
        return f"{registry.name_of(decoding)} searches over beams"
    if compiled.saliency_layers:
        return f"{registry.name_of(decoding)} takes gradients of every step"
    if compiled.reads is not None:
        return f"{registry.name_of(decoding)} has another language model read along"
    methods = [*compiled.attention, *(() if compiled.decoding is None else (compiled.decoding,))]
    for method in methods:
        if not method.replays:
            return f"{registry.name_of(method)} does not say that its steps can be replayed (`replayable = True`)"
    for method in compiled.attention:
        if method.follows_rows:
            return f"{registry.name_of(method)} takes notes on every token"
    if watched:
        return "attention is being recorded"
    if (asked("num_beams") or 1) > 1:
        return "beam search"
    if asked("use_cache") is False:
        return "use_cache=False"
    for name in ("cache_implementation", "prefill_chunk_size", "output_attentions", "output_hidden_states"):
        if asked(name):
            return f"{name}={asked(name)!r}"
    if kwargs.get("synced_gpus"):
        return "synced_gpus=True"
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and (mask.dim() != 2 or bool((mask.bool() != (mask.cumsum(1) > 0)).any())):
        return "the prompt has padding behind its first token, or a mask of more than two dimensions"
    if automatic and asked("return_dict_in_generate"):
        return "return_dict_in_generate=True hands out the cache, which a captured step keeps"
    if getattr(parts.model, "hf_device_map", None) and len(set(parts.model.hf_device_map.values())) > 1:
        return "the model is spread over several devices"
    return ""
