"""The public way in: load or wrap a model, answer, generate, apply for a while."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmfix import registry
from vlmfix.attention import run
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.observing import OBSERVERS, watched
from vlmfix.attention.request import NO_PICTURE, OWN, Request
from vlmfix.diagnostics.looking import Gaze
from vlmfix.diagnostics.recording import Recording
from vlmfix.engine import search
from vlmfix.errors import Refusal, UsageError
from vlmfix.hf import encoding, hooks, loading, settings
from vlmfix.hf.batches import Batch, Batcher
from vlmfix.hf.cache import only_full_attention
from vlmfix.hf.evidence import FirstToken
from vlmfix.hf.families import CROSSING, FAMILIES, UNBRANCHED
from vlmfix.hf.inputs import mask_kind
from vlmfix.hf.parts import Parts
from vlmfix.hf.sharing import share, shareable
from vlmfix.hf.sinks import sink_dims
from vlmfix.layout import MaskKind
from vlmfix.method import ModelFacts
from vlmfix.presets import preset
from vlmfix.recipe import Recipe


@dataclass(frozen=True)
class Answer:
    """One answer with what it took.

    Args:
        text: the answer.
        tokens: generated tokens, the end token included.
        seconds: time of its batch divided by the batch's size.
        report: what acted where; see `FixedVLM.report`.
        evidence: measures of this answer by name: visual_tokens, prefill_seconds (its share of the batch's), and
            margin, by how much the first token's scores prefer yes to no.
    """

    text: str
    tokens: int
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


class FixedVLM:
    """A model, its processor and a recipe.

    Args:
        model: a model of AutoModelForImageTextToText.
        processor: its processor; only `generate` works without one.
        recipe: a recipe, a method, a text, or a list of these.

    Raises:
        Refusal: the recipe cannot act on this model.
    """

    def __init__(self, model: nn.Module, processor: Any, recipe: Any = "greedy") -> None:
        self.model: Any = bare(model)
        self.processor = processor
        self.recipe = Recipe.of(recipe)
        self.report: dict[str, Any] = {}
        with hooks.installed(self.model) as parts:
            self.parts = parts
            self.compiled = compile_for(parts, self.recipe, processor)
            if not self.compiled.plain:
                hooks.acquire(self.model)
                self._finalizer = weakref.finalize(self, hooks.release, self.model)
        self._batcher = Batcher(parts, processor)
        self._encoded = encoding.Memory()

    def close(self) -> None:
        """Restores the model if this was its last user; also happens when the object is dropped."""
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()

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
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None and not finalizer.alive:
            raise UsageError(f"{self.recipe}: this model was closed, so the recipe no longer acts; wrap it again")
        refuse_tensors(self.compiled)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        return self._generate(seed, ids, {**kwargs, "generation_config": generation_config})

    def _generate(self, seed: int | None, ids: Sequence[str] | None, kwargs: dict[str, Any]) -> Any:
        """As `generate`; pictures are redrawn already."""
        kwargs, overridden = settings.plain(self.model.generation_config, settings.spelled_out(kwargs))
        draw = None
        if seed is not None and kwargs.get("do_sample"):
            entry = kwargs.get("input_ids")
            rows = (entry if entry is not None else kwargs["inputs_embeds"]).shape[0]
            names = [str(i) for i in range(rows)] if ids is None else [str(i) for i in ids]
            if len(names) != rows:
                raise UsageError(f"ids= names {len(names)} samples, the batch has {rows}")
            kwargs, draw = settings.seeded(kwargs, seed, names)
        generate = _own(self.model)
        with encoding.once(self.model, self._encoded), _outside():
            if self.compiled.plain and not watched(self.model):
                result, request = generate(**{k: v for k, v in kwargs.items() if k != "visual_mask"}), None
            else:
                with hooks.installed(self.model) as parts:
                    call = search.caller(parts, self.compiled, generate)
                    result, request = run.generate(parts, self.compiled, call, kwargs, self._batcher.global_tile)
        if draw is not None and draw.scores is not None:
            result.scores = tuple(draw.scores)
        self.report = report_of(self.recipe, self.parts, self.compiled, request, overridden)
        return result

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
            UsageError: lists of different lengths.
        """
        single = not isinstance(images, list) and isinstance(prompts, str)
        pictures, questions = _paired(images, prompts)
        names = [str(i) for i in range(len(questions))] if ids is None else [str(i) for i in ids]
        if len(names) != len(questions):
            raise UsageError(f"ids= names {len(names)} items, {len(questions)} were given")
        if (generation.get("num_return_sequences") or 1) > 1:
            raise UsageError("answer gives one answer for each question; for num_return_sequences call generate")
        out: list[Answer | None] = [None] * len(questions)
        pictures = self._redrawn(pictures, questions, system)
        for batch in self._batcher.batches(pictures, questions, system):
            started = time.perf_counter()
            inputs = self._shared(batch, generation)
            chosen = [names[i] for i in batch.items]
            first = FirstToken(*self._batcher.yes_and_no, len(chosen))
            options = {**first.listening(generation), "max_new_tokens": max_new_tokens}
            tokens = self._generate(seed, chosen, {**inputs, **options})
            self._report_redrawn(len(batch.pictures))
            texts = self._batcher.decode(tokens, inputs)
            seconds = (time.perf_counter() - started) / len(batch.items)
            for row, (i, (text, count)) in enumerate(zip(batch.items, texts, strict=True)):
                evidence = {"visual_tokens": self._tokens_of(row, inputs), **first.of(row)}
                out[i] = Answer(text, count, seconds, self.report, evidence)
        answers = [a for a in out if a is not None]
        final: list[Any] = list(answers) if details else [a.text for a in answers]
        return final[0] if single else final

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
        if watched(self.model):
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


def load(
    model: str | Path = "pico",
    recipe: Any = "greedy",
    *,
    device: str | None = None,
    dtype: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    quantize: str | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> FixedVLM:
    """Loads a checkpoint and wraps it.

    Args:
        model: a Hub id, a folder, or "pico" for the bundled model.
        recipe: as in `wrap`.
        device: "cpu", "cuda", ...; the first GPU if there is one by default.
        dtype: "auto", "float32", "bfloat16", ...; bfloat16 on a GPU, float32 elsewhere by default.
        device_map: spread over devices by accelerate; excludes device.
        revision: branch, tag or commit on the Hub.
        quantize: "4bit" or "8bit" (needs bitsandbytes).
        processor_kwargs: settings of the processor.
        trust_remote_code: run code that a checkpoint brings; off.
        from_pretrained: further keywords of from_pretrained (quantization_config, max_memory, ...).

    Raises:
        UsageError: no such model, or one without a processor.
        Refusal: not a model the recipe can act on.
    """
    loaded, processor = loading.load(
        model,
        device,
        dtype,
        device_map,
        revision,
        quantize,
        dict(processor_kwargs or {}),
        trust_remote_code,
        from_pretrained,
    )
    return FixedVLM(loaded, processor, recipe)


def wrap(model: nn.Module, processor: Any, recipe: Any = "greedy") -> FixedVLM:
    """Wraps a loaded model; see `FixedVLM`."""
    return FixedVLM(model, processor, recipe)


_APPLIED: ContextVar[tuple[_Application, ...]] = ContextVar("vlmfix_applied", default=())


@dataclass(frozen=True, eq=False)
class _Application:
    parts: Parts
    compiled: Compiled
    recipe: Recipe
    global_tile: int | None


@contextlib.contextmanager
def applied(model: nn.Module, processor: Any, recipe: Any) -> Iterator[Recipe]:
    """Applies a recipe to a model's own `generate` and forward for as long as the context lives.

    The recipe belongs to this thread or task: others see the plain model. Contexts nest, the innermost counts. A new
    thread starts with an empty context; start it with `contextvars.copy_context().run`.

    Args:
        model: a model of AutoModelForImageTextToText.
        processor: its processor, or None.
        recipe: a recipe, a method, a text, or a list of these.

    Yields:
        The recipe.
    """
    target = bare(model)
    chosen = Recipe.of(recipe)
    with hooks.installed(target) as parts, _own_generate(target):
        compiled = compile_for(parts, chosen, processor)
        application = _Application(parts, compiled, chosen, Batcher(parts, processor).global_tile)
        token = _APPLIED.set((*_APPLIED.get(), application))
        try:
            yield chosen
        finally:
            _APPLIED.reset(token)


@contextlib.contextmanager
def record(
    model: Any,
    processor: Any = None,
    what: Sequence[str] = ("visual_mass",),
    *,
    layers: Sequence[int] | None = None,
    sink_dims: tuple[int, ...] | None = None,
    tau: float | None = None,
) -> Iterator[Recording]:
    """Records statistics of attention around any generate of a model, with or without a recipe.

    Tokens stay the same: where nothing else acts, the model's own attention function runs and statistics are measured
    beside it. Memory grows with steps, layers and heads alone (`map`: with the prompt instead of heads).

    Args:
        model: a model of AutoModelForImageTextToText, or a `FixedVLM`.
        processor: its processor; only used to find sink dimensions.
        what: names among `vlmfix.diagnostics.recording.WHAT`.
        layers: decoder layers; all by default.
        sink_dims: for `sink_share`: hidden dimensions of massive activations; measured by default.
        tau: for `sink_share`: see `Recording`.

    Yields:
        What was recorded; the last generation's statistics are its attributes.

    Raises:
        UsageError: a name that cannot be recorded.
    """
    if isinstance(model, FixedVLM):
        model, processor = model.model, model.processor
    target = bare(model)
    recording = Recording(target, what, layers, sink_dims, tau)
    with contextlib.ExitStack() as stack:
        if not any(a.parts.model is target for a in _APPLIED.get()):
            stack.enter_context(applied(target, processor, "greedy"))
        token = OBSERVERS.set((*OBSERVERS.get(), recording))
        try:
            yield recording
        finally:
            OBSERVERS.reset(token)


def refuse_tensors(compiled: Compiled) -> None:
    """Refuses recipes that redraw pictures where there are only tensors left of them."""
    for method in compiled.pictures:
        raise Refusal(
            f"{registry.name_of(method)} redraws the picture itself and cannot act on a processor's tensors "
            f"({compiled.facts.family}); call answer(images, prompts)"
        )


def compile_for(parts: Parts, recipe: Recipe, processor: Any = None) -> Compiled:
    """Compiles a recipe for an installed model, with the presets of its checkpoint."""
    config = parts.text_config
    tokenizer = getattr(processor, "tokenizer", None)
    facts = ModelFacts(
        family=parts.family,
        depth=parts.depth,
        heads=parts.heads,
        hidden_size=parts.hidden_size,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        prefix=mask_kind(parts.family) == MaskKind.PREFIX,
        crossing=parts.family in CROSSING,
        class_attention=bool(parts.tower),
        packable=mask_kind(parts.family) == MaskKind.CAUSAL and only_full_attention(config),
        unbranched=FAMILIES[parts.family].branches if parts.family in UNBRANCHED else "",
        sink_dims=lambda: sink_dims(parts, tokenizer),
        tokenize=None
        if tokenizer is None
        else lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        rendering=None if processor is None else Batcher(parts, processor),
    )
    return recipe.compile(facts, preset(getattr(parts.model.config, "_name_or_path", "") or ""))


def bare(model: nn.Module) -> nn.Module:
    """The model under wrappers that only forward to it.

    Raises:
        Refusal: a compiled model, whose graph would not contain the recipe.
    """
    if hasattr(model, "_orig_mod"):
        raise Refusal("the model was compiled with torch.compile; give the model itself, before compilation")
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def report_of(
    recipe: Recipe, parts: Parts, compiled: Compiled, request: Request | None, overridden: dict[str, Any]
) -> dict[str, Any]:
    """What acted where in one run, in plain values."""
    report: dict[str, Any] = {
        "recipe": str(recipe),
        "recipe_hash": recipe.hash,
        "evidence": recipe.evidence,
        "family": parts.family,
        "neutral": list(compiled.dropped),
        "overridden_generation_config": overridden,
    }
    if request is None:
        return report
    report["visual_tokens"] = request.visual_tokens
    report["pictures"] = request.pictures
    report["branches"] = request.copies - 1
    report["methods"] = {
        registry.name_of(method): {
            "layers": sorted(request.layers.layers_touched[i]),
            "heads": sorted({parts.heads[x] for x in request.layers.layers_touched[i]}),
            "rows": request.layers.rows_affected[i],
            **({} if request.layers.layers_touched[i] else {"inactive": request.why_inactive(i)}),
        }
        for i, method in enumerate(compiled.attention)
        if i not in compiled.own
    }
    if compiled.decoding is not None:
        rows = request.rows_rewritten
        touched = set().union(*(request.layers.layers_touched[i] for i in compiled.own))
        returns = request.layers.notes.get(OWN, {}).get(search.RETURNS)
        report["methods"][registry.name_of(compiled.decoding)] = {
            "rows": rows,
            "steps": request.steps,
            **({"layers": sorted(touched)} if touched else {}),
            **({} if returns is None else {search.RETURNS: returns.tolist()}),
            **({} if rows else {"inactive": NO_PICTURE}),
        }
    return report


def _open(parts: Parts, kwargs: dict[str, Any]) -> Request | None:
    """A request for a forward outside generate: that of its cache, or a new one for a new prompt."""
    cache = kwargs.get("past_key_values")
    state = getattr(cache, "state", None)
    if isinstance(state, Request):
        return state
    application = next((a for a in reversed(_APPLIED.get()) if a.parts is parts), None)
    if application is not None:
        refuse_tensors(application.compiled)
    if application is None or (application.compiled.plain and not watched(parts.model)):
        return None
    if cache is not None and cache.get_seq_length() > 0:
        raise UsageError(
            "this cache was filled outside the recipe; start from an empty cache inside `applied`, or call generate"
        )
    decoding = application.compiled.decoding
    if decoding is not None and decoding.search() is not None:
        raise Refusal(f"{registry.name_of(decoding)} decides over whole beams: call generate instead of the forward")
    request, _ = run.open_request(parts, application.compiled, kwargs, application.global_tile)
    return request


hooks.OPEN.append(_open)
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _own_generate(model: Any) -> Iterator[None]:
    """Puts a `generate` on the instance that looks up the recipe of its context; counted.

    The last leaver removes it.
    """
    with hooks.LOCK:
        count = _WRAPPED.setdefault(model, [0])
        if count[0] == 0:
            model.generate = _Generate(model)
        count[0] += 1
    try:
        yield
    finally:
        with hooks.LOCK:
            count[0] -= 1
            if count[0] == 0:
                del model.generate
                del _WRAPPED[model]


class _Generate:
    """An instance's generate under `applied`."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __call__(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        model: Any = self._model()
        plain = _own(model)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        applications = [a for a in _APPLIED.get() if a.parts.model is model]
        if not applications:
            hooks.warn_once(
                "generate was called in a thread or task without the recipe applied elsewhere and runs plain; "
                "start the thread with "
                "contextvars.copy_context().run to take the recipe along"
            )
            return plain(**kwargs)
        current = applications[-1]
        refuse_tensors(current.compiled)
        if current.compiled.plain and not watched(model):
            return plain(**{k: v for k, v in kwargs.items() if k != "visual_mask"})
        call = search.caller(current.parts, current.compiled, plain)
        return run.generate(current.parts, current.compiled, call, kwargs, current.global_tile)[0]


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Within the block no applied recipe counts."""
    token = _APPLIED.set(())
    try:
        yield
    finally:
        _APPLIED.reset(token)


def _own(model: Any) -> Any:
    """The model's generate without the recipes of its context."""
    found = vars(model).get("generate")
    return settings.own_generate(model) if found is None or isinstance(found, _Generate) else found


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
