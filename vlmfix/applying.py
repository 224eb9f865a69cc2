"""Recipes and recorders applied to a model for as long as a block lasts."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlmfix import registry
from vlmfix.attention import run
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.observing import watched
from vlmfix.attention.request import Request
from vlmfix.engine import search
from vlmfix.errors import Refusal, UsageError
from vlmfix.hf import hooks, settings
from vlmfix.hf.batches import Batcher
from vlmfix.hf.parts import Parts
from vlmfix.preparing import bare, compile_for, refuse_tensors
from vlmfix.recipe import Recipe

_APPLIED: ContextVar[tuple[_Application, ...]] = ContextVar("vlmfix_applied", default=())
_WRAPPED: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


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


def is_applied(model: nn.Module) -> bool:
    """Whether any recipe is applied to a model in this thread or task."""
    return any(a.parts.model is model for a in _APPLIED.get())


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
        plain = own(model)
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
def outside() -> Iterator[None]:
    """Within the block no applied recipe counts."""
    token = _APPLIED.set(())
    try:
        yield
    finally:
        _APPLIED.reset(token)


def own(model: Any) -> Any:
    """The model's generate without the recipes of its context."""
    found = vars(model).get("generate")
    return settings.own_generate(model) if found is None or isinstance(found, _Generate) else found
