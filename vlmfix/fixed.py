"""A model, its processor and a recipe, kept together."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmfix import registry, settling
from vlmfix.applying import outside, own
from vlmfix.attention import run
from vlmfix.attention.observing import watched
from vlmfix.diagnostics.looking import Gaze
from vlmfix.engine import search
from vlmfix.engine.graph import Engine
from vlmfix.errors import UsageError
from vlmfix.hf import encoding, hooks, settings
from vlmfix.hf.batches import Batch, Batcher
from vlmfix.hf.evidence import FirstToken
from vlmfix.hf.sharing import share, shareable
from vlmfix.preparing import bare, compile_for, refuse_tensors, report_of
from vlmfix.recipe import Recipe
from vlmfix.settling import Answer as Answer


class FixedVLM:
    """A model, its processor and a recipe.

    Args:
        model: a model of AutoModelForImageTextToText.
        processor: its processor; only `generate` works without one.
        recipe: a recipe, a method, a text, or a list of these.
        engine: "hf" for transformers' decoding loop, "graph" for one captured step that is replayed, "auto" for the
            second on a GPU. Where a call cannot be captured it runs in transformers' loop, with the reason in the
            report; where "graph" was asked for, with a warning too.
        compile: compile the decoder's blocks before a step is captured: faster steps after some ten seconds.

    Raises:
        Refusal: the recipe cannot act on this model.
        UsageError: no such engine.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        recipe: Any = "greedy",
        engine: str = "auto",
        compile: bool = False,
    ) -> None:
        self.model: Any = bare(model)
        self.processor = processor
        self.recipe = Recipe.of(recipe)
        self.report: dict[str, Any] = {}
        self._engine = Engine(engine, compile)
        self._closed = False
        with hooks.installed(self.model) as parts:
            self.parts = parts
            self.compiled = compile_for(parts, self.recipe, processor)
            self._hold()
        self._batcher = Batcher(parts, processor)
        self._encoded = encoding.Memory()

    def _hold(self) -> None:
        """Stays on the model from the first call on that needs it; a plain model may move to a GPU later.

        Raises:
            UsageError: the model was closed.
        """
        finalizer = getattr(self, "_finalizer", None)
        if self._closed or (finalizer is not None and not finalizer.alive):
            raise UsageError(f"{self.recipe}: this model was closed, so the recipe no longer acts; wrap it again")
        with hooks.LOCK:
            if not hasattr(self, "_finalizer") and (not self.compiled.plain or self._engine.wanted(self.parts)):
                self.parts = hooks.acquire(self.model)
                self._finalizer = weakref.finalize(self, hooks.release, self.model)

    def close(self) -> None:
        """Restores the model if this was its last user; also happens when the object is dropped.

        Afterwards `generate` and `answer` refuse, whatever the recipe.
        """
        self._closed = True
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()
        self._engine.close()

    @property
    def engine(self) -> dict[str, Any]:
        """The keywords `engine` and `compile` it was made with."""
        return {"engine": self._engine.kind, "compile": self._engine.compile}

    def __enter__(self) -> FixedVLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        seed: int | None = None,
        ids: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Transformers' generate under the recipe: same keywords, same result type, only the caller's rows.

        Decoding is greedy unless asked otherwise: sampling, penalties and beams that a checkpoint's
        generation_config brings are overridden, and the override is reported.

        Args:
            inputs: [B, K] token ids, if not among the keywords as input_ids.
            generation_config: settings that count like keywords.
            seed: makes sampling a function of (seed, id, sample, step), the same in any batch.
            ids: names of the samples for that; their index by default.
            kwargs: everything the processor returned, and generate's own keywords.

        Returns:
            Token ids or a ModelOutput, as transformers' generate.

        Raises:
            UsageError: the model was closed.
        """
        self._hold()
        refuse_tensors(self.compiled)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        return self._generate(seed, ids, {**kwargs, "generation_config": generation_config})

    def _generate(self, seed: int | None, ids: Sequence[str] | None, kwargs: dict[str, Any]) -> Any:
        """As `generate`; the model is held and pictures are redrawn already."""
        kwargs, overridden = settings.plain(self.model.generation_config, settings.spelled_out(kwargs))
        draw = None
        if seed is not None and kwargs.get("do_sample"):
            entry = kwargs.get("input_ids")
            rows = (entry if entry is not None else kwargs["inputs_embeds"]).shape[0]
            names = [str(i) for i in range(rows)] if ids is None else [str(i) for i in ids]
            if len(names) != rows:
                raise UsageError(f"ids= names {len(names)} samples, the batch has {rows}")
            kwargs, draw = settings.seeded(kwargs, seed, names)
        generate = own(self.model)
        with encoding.once(self.parts, self._encoded), outside():
            result, request = self._engine.generate(
                self.parts, self.compiled, generate, self._run(kwargs), kwargs, watched(self.model)
            )
        if draw is not None and draw.scores is not None and not isinstance(result, Tensor):
            result.scores = tuple(draw.scores[: len(result.scores)])  # a loop may look late whether all have ended
        self.report = report_of(self.recipe, self.parts, self.compiled, request, overridden)
        self.report["engine"] = self._engine.report
        return result

    def _run(self, kwargs: dict[str, Any]) -> Callable[[Callable[..., Any]], tuple[Any, Any]]:
        """What runs a generate under the recipe."""

        def run_with(generate: Callable[..., Any]) -> tuple[Any, Any]:
            if self.compiled.plain and not watched(self.model) and not self._engine.wanted(self.parts):
                return generate(**{k: v for k, v in kwargs.items() if k != "visual_mask"}), None
            with hooks.installed(self.model) as parts:
                call = search.caller(parts, self.compiled, generate)
                return run.generate(parts, self.compiled, call, kwargs, self._batcher.global_tile)

        return run_with

    def answer(
        self,
        images: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 256,
        system: str | None = None,
        seed: int | None = None,
        ids: Sequence[str] | None = None,
        details: bool = False,
        **generation: Any,
    ) -> Any:
        """Answers questions about pictures; one in, one out, lists in, lists out.

        Args:
            images: a picture (PIL image or path), None, or a list of these; an entry may be a list of several pictures.
            prompts: a question or a list of questions; one question for many pictures and the reverse are repeated.
            max_new_tokens: limit of each answer.
            system: system prompt, where the model's template has a place for one.
            seed: of sampling, see `generate`.
            ids: names of the items, for sampling.
            details: return `Answer` instead of text.
            generation: further keywords of generate.

        Returns:
            str, or `Answer` with details; a list of them for lists.

        Raises:
            PictureError: a picture that cannot be read, named.
            UsageError: lists of different lengths, or the model was closed.
        """
        self._hold()
        single = not isinstance(images, list) and isinstance(prompts, str)
        pictures, questions = _paired(images, prompts)
        names = [str(i) for i in range(len(questions))] if ids is None else [str(i) for i in ids]
        if len(names) != len(questions):
            raise UsageError(f"ids= names {len(names)} items, {len(questions)} were given")
        if (generation.get("num_return_sequences") or 1) > 1:
            raise UsageError("answer gives one answer for each question; for num_return_sequences call generate")
        settles = self.compiled.answer
        settling.refuse_streams(settles, generation)
        pictures = self._redrawn(pictures, questions, system)
        answering = partial(self._answered, system, seed, {**generation, "max_new_tokens": max_new_tokens})
        if settles is None:
            answers = answering(pictures, questions, names)
        else:
            answers, report = answering(pictures, questions, names), self.report
            rows = [self._batcher.opened(entry) for entry in pictures]
            answers = settling.settle(settles, answers, rows, questions, names, answering)
            self.report = settling.summary(settles, answers, report)
        final: list[Any] = answers if details else [a.text for a in answers]
        return final[0] if single else final

    def _answered(
        self,
        system: str | None,
        seed: int | None,
        generation: Mapping[str, Any],
        pictures: Sequence[Any],
        questions: Sequence[str],
        names: Sequence[str],
    ) -> list[Answer]:
        """One answer for each question; pictures are redrawn already."""
        out: list[Answer | None] = [None] * len(questions)
        for batch in self._batcher.batches(pictures, questions, system):
            started = time.perf_counter()
            inputs = self._shared(batch, generation)
            chosen = [names[i] for i in batch.items]
            first = FirstToken(*self._batcher.yes_and_no, len(chosen))
            tokens = self._generate(seed, chosen, {**inputs, **first.listening(generation)})
            self._report_redrawn(len(batch.pictures))
            texts = self._batcher.decode(tokens, inputs)
            seconds = (time.perf_counter() - started) / len(batch.items)
            for row, (i, (text, count)) in enumerate(zip(batch.items, texts, strict=True)):
                evidence = {"visual_tokens": self._tokens_of(row, inputs), **first.of(row)}
                out[i] = Answer(text, count, seconds, self.report, evidence)
        return [a for a in out if a is not None]

    def _redrawn(self, pictures: list[Any], questions: list[str], system: str | None) -> list[Any]:
        """Pictures as the recipe's picture methods redraw them; items without pictures stay."""
        if not self.compiled.pictures:
            return pictures
        rows = [self._batcher.opened(entry) for entry in pictures]
        seen = [i for i, row in enumerate(rows) if row]
        gaze = Gaze(self._batcher, self.compiled.facts, system)
        for method in self.compiled.pictures:
            chosen, asked = [rows[i] for i in seen], [questions[i] for i in seen]
            for i, row in zip(seen, method.redraw(chosen, asked, gaze, self.parts.depth), strict=True):
                rows[i] = row
        return [row or None for row in rows]

    def _report_redrawn(self, rows: int) -> None:
        for method in self.compiled.pictures:
            self.report.setdefault("methods", {})[registry.name_of(method)] = {"rows": rows}

    def _shared(self, batch: Batch, generation: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's inputs, with the prefixes of rows about one picture read once where that changes nothing."""
        if watched(self.model) or self._engine.worthwhile(self.parts, generation.get("max_new_tokens")):
            return batch.inputs
        alone = len(set(batch.pictures)) == len(batch.pictures) or batch.inputs.get("pixel_values") is None
        asked = any(generation.get(name) for name in ("num_beams", "num_return_sequences", "cache_implementation"))
        cached = generation.get("use_cache", True) is not False
        if alone or asked or not cached or not self.compiled.prefix_plain or not shareable(self.parts):
            return batch.inputs
        return share(self.parts, batch.inputs, batch.pictures)

    def _tokens_of(self, row: int, inputs: Mapping[str, Any]) -> int:
        found = sum((inputs["input_ids"][row] == token).sum() for token in self.parts.image_ids)
        return int(found)


def _paired(images: Any, prompts: Any) -> tuple[list[Any], list[str]]:
    questions = [prompts] if isinstance(prompts, str) else list(prompts)
    pictures = list(images) if isinstance(images, list) else [images]
    if len(pictures) == 1 and len(questions) > 1:
        pictures = pictures * len(questions)
    if len(questions) == 1 and len(pictures) > 1:
        questions = questions * len(pictures)
    if len(pictures) != len(questions):
        raise UsageError(f"{len(pictures)} pictures and {len(questions)} prompts: give equal numbers, or one of either")
    return pictures, questions
