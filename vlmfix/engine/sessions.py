"""One decoding step over fixed addresses, captured once in a CUDA graph and replayed token by token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmfix.attention.request import Request
from vlmfix.attention.values import overwrite
from vlmfix.engine.forms import AS_IT_IS, COMPILED, Form
from vlmfix.hf.hooks import serving
from vlmfix.hf.parts import Parts
from vlmfix.hf.slots import MARK, Frame, SlotCache
from vlmfix.hf.stepping import Choice, Prefilled, Task

_LOG = logging.getLogger("vlmfix")


class Session:
    """The step of one shape: embedding, layers, methods, branches, choice of the token and end test.

    Nothing in it reads from or waits for the device, so on a GPU it runs as one graph; elsewhere, or where capturing
    fails, it runs as it is. `reason` says why it was not captured, or not compiled where that was asked for.

    Args:
        parts: the model.
        request: state of the generation it is made for; later generations are copied into it.
        task: the call it is made for.
        choice: of its tokens.
        prefilled: its prompt.
        capacity: slots of the cache.
        forms: of the decoder, the preferred one first; where none works it runs as it is.
    """

    def __init__(
        self,
        parts: Parts,
        request: Request,
        task: Task,
        choice: Choice,
        prefilled: Prefilled,
        capacity: int,
        forms: Sequence[Form] = (),
    ) -> None:
        valid, positions = request.standing(prefilled.valid)
        device = valid.device
        self.parts, self.request, self._forms = parts, request, forms
        self.choice = choice
        self.capacity = capacity
        self.capture_seconds = 0.0
        self.reason = ""
        self.captured, self.form = False, AS_IT_IS.name
        self._replay: Callable[[], None] | None = None
        self._copies = request.copies
        self._ends, self._fill = task.ends, task.fill
        visible, count = len(prefilled.valid), choice.uniforms(capacity)
        slot = torch.zeros(1, dtype=torch.long, device=device)
        cache = SlotCache.of(prefilled.cache, capacity, slot)
        start, number = torch.zeros(len(valid), 1, dtype=torch.long, device=device), torch.zeros_like(slot[0])
        self.frame = Frame(cache, slot, start, number)
        self._positions = torch.zeros_like(positions)
        self._tokens = torch.zeros(visible, dtype=torch.long, device=device)
        self._done = torch.zeros(visible, dtype=torch.bool, device=device)
        self._lived = torch.zeros_like(number)
        self._written = torch.zeros(visible, capacity, dtype=torch.long, device=device)
        self._cursor = torch.zeros_like(slot)
        self._uniforms = None if count is None else torch.empty_like(count)
        self._mark = MARK.to(device)
        self.scores = torch.empty(0)
        request.settle(self.frame, capacity)
        request.frame = self.frame

    def fits(self, request: Request) -> bool:
        """Takes over another generation's plans; False where they differ in more than values."""
        if request is self.request:
            return True
        if self.request.replanned:
            return False
        request.layers.settle(self.capacity)
        return self.request.overwrite(request)

    def start(self, request: Request, choice: Choice, prefilled: Prefilled, token: Tensor) -> None:
        """Puts a read prompt and its first token in place."""
        valid, positions = request.standing(prefilled.valid)
        frame, length = self.frame, valid.shape[1]
        frame.cache.fill(prefilled.cache, length)
        frame.slot.fill_(length)
        frame.number.fill_(2)
        frame.start.copy_(valid.long().argmax(1, keepdim=True))
        self._positions.copy_(positions + 1)
        self._cursor.fill_(0)
        self._lived.fill_(0)
        self._done.fill_(False)
        self._written.fill_(self._fill)
        uniforms = choice.uniforms(self.capacity)
        if self._uniforms is not None and uniforms is not None:  # both or neither: it is part of the session's key
            self._uniforms.copy_(uniforms)
        self.take(token)

    def take(self, drawn: Tensor) -> None:
        """Writes the next token [B] of every row that has not ended."""
        self._lived += (~self._done).any().long()
        token = drawn if self._ends is None else torch.where(self._done, self._fill, drawn)
        self._written.index_copy_(1, self._cursor, token[:, None])
        self._cursor += 1
        if self._ends is not None:
            self._done |= (token[:, None] == self._ends).any(1)
        self._tokens.copy_(token)

    def end(self, rows: Tensor) -> None:
        """Ends the sequences of some rows [B] bool."""
        self._done |= rows

    @property
    def ended(self) -> bool:
        """Whether all sequences have ended; waits for the device."""
        return bool(self._done.all())

    @property
    def last(self) -> Tensor:
        """[B] the tokens written last."""
        return self._tokens

    def written(self, count: int | None = None) -> Tensor:
        """[B, n] tokens so far: `count`, or as many as were written before all rows had ended."""
        return self._written[:, : int(self._lived) if count is None else count].clone()

    def step(self) -> None:
        """Feeds the last token; leaves `scores` and, where the choice is pure, writes the next one."""
        if self._replay is None:
            device = self._tokens.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # draws are those of replays alone
                self._replay = self._captured()
        self._replay()

    def _advance(self) -> None:
        frame = self.frame
        frame.begin()
        # whichever generation it is for: its state was copied into this one; a step that fails leaves no gradients on
        with torch.no_grad(), serving(self.request):
            output = self.parts.top(
                input_ids=self._tokens[:, None].repeat(self._copies, 1),
                position_ids=self._positions,
                attention_mask=self._mark,
                past_key_values=frame.cache,
                use_cache=True,
                return_dict=True,
            )
        self.scores = output.logits[:, -1].float()
        if self.choice.pure:
            u = None
            if self._uniforms is not None:
                u = self._uniforms.index_select(1, (frame.number - 1)[None])[:, 0]
            self.take(self.choice.pick(self.scores, u))
        frame.slot += 1
        frame.number += 1
        self._positions += 1

    def _captured(self) -> Callable[[], None]:
        """The step as one replayable graph where that is possible; itself otherwise."""
        started = time.perf_counter()
        frame = self.frame
        clock = [frame.slot, frame.number, self._positions, self._cursor, self._lived, self._tokens, self._done]
        noted = dict(self.request.notes)
        state = [*clock, *noted.values()]
        before = [t.clone() for t in state]

        def restore() -> None:
            self.request.notes.clear()
            self.request.notes.update(noted)
            _restore(state, before)

        kind = self._tokens.device.type
        recorder = RECORDERS.get(kind)
        failed: dict[str, str] = {}
        replay: Callable[[], None] = self._advance
        traced = bool(self.request.compiled.saliency_layers)
        for form in (*self._forms, AS_IT_IS):
            if traced and not form.gradients:
                failed[form.name] = f"gradients of every step are taken, so the decoder does not run {form.name}"
                continue
            step = self._in(form)
            try:
                if recorder is not None:
                    replay, self.captured = recorder(self._keeping(noted, step), restore, self._tokens.device), True
                elif form.uncaptured:
                    step()
                    replay = step
                else:
                    continue
                self.form = form.name
                break
            except Exception as error:
                failed[form.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                _LOG.warning("this step cannot be captured %s: %s", form.name, failed[form.name])
            finally:
                restore()
        if self.captured:
            self.reason = failed.get(COMPILED, "")
        elif recorder is None:
            self.reason = failed.get(COMPILED) or f"there are no graphs on {kind}: every step runs anew"
        else:
            self.reason = failed[AS_IT_IS.name]
        self.capture_seconds = time.perf_counter() - started
        return replay

    def _in(self, form: Form) -> Callable[[], None]:
        def step() -> None:
            with form.around():
                self._advance()

        return step

    def _keeping(self, noted: dict[str, Tensor], step: Callable[[], None]) -> Callable[[], None]:
        """A step that writes what the decoding method noted to where it read its notes."""

        def keeping() -> None:
            step()
            new = self.request.notes.items()
            found = {name: note if note is noted.get(name) else note.clone() for name, note in new}
            if not overwrite(noted, found):
                raise RuntimeError(f"the notes {', '.join(found)} are not the same in number, shape and type")

        return keeping


Recorder = Callable[[Callable[[], None], Callable[[], None], torch.device], Callable[[], None]]


def cuda_graph(step: Callable[[], None], restore: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Records a step in a CUDA graph.

    Args:
        step: what is recorded; it runs once before, so that kernels are built and libraries ready.
        restore: undoes what that run changed.
        device: where it runs.

    Returns:
        What runs the recorded step.
    """
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            restore()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.synchronize()
    return graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}
"""Kind of device -> what records a step on it; elsewhere steps run as they are."""


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
