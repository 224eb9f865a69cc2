"""Installing on a model and restoring it exactly; handing each call its own request."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

from vlmfix.errors import Refusal
from vlmfix.hf import attend
from vlmfix.hf.parts import Parts, find


class Request(attend.Request, Protocol):
    """State of one generation, as the hooks see it."""

    parts: Parts

    def before(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the model's forward, rewritten for the branches."""
        ...

    def after(self, output: Any) -> Any:
        """The forward's output, contracted to the visible rows."""
        ...

    def step(self, rows: int, queries: int, past: Any, device: Any) -> None:
        """A decoder forward begins."""
        ...

    def entering(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the decoder's forward, changed where a branch asks for it."""
        ...

    def observe(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, Q, width] residual stream entering a layer; what is returned enters."""
        ...

    def see(self, layer: int, attention: nn.Module, hidden: Tensor) -> None:
        """[tiles, 1 + N, width] input of a vision layer's attention, class token first."""
        ...


REQUEST: ContextVar[Request | None] = ContextVar("vlmfix_request", default=None)
LOCK = threading.RLock()
"""Held while a model is installed or restored."""

_INSTALLED: weakref.WeakKeyDictionary[nn.Module, _Installation] = weakref.WeakKeyDictionary()


_LOG = logging.getLogger("vlmfix")
_WARNED: set[tuple[str, int]] = set()


def warn_once(message: str, level: int = logging.WARNING) -> None:
    """Logs a warning, or a message of another level, the first time it occurs in this process."""
    if (message, level) not in _WARNED:
        _WARNED.add((message, level))
        _LOG.log(level, message)


class Opener(Protocol):
    """Makes a request for a forward outside `generate`; None where nothing is applied."""

    def __call__(self, parts: Parts, kwargs: dict[str, Any]) -> Request | None:
        """The request of a forward with these keywords."""
        ...


OPEN: list[Opener] = []
"""At most one opener, set by the layer above: plain forwards inside `applied` find their recipe through it."""


class _Installation:
    """Our attention function and hooks on one model, counted."""

    def __init__(self, model: nn.Module, require_pictures: bool) -> None:
        self.users = 0
        self.saved = _implementations(model)
        self.handles: list[Any] = []
        attend.register()
        try:
            _select(model)
            self.parts = find(model, require_pictures)
            self._hook()
        except BaseException:
            self.remove(model)
            raise

    def _hook(self) -> None:
        parts = self.parts
        self.handles.append(parts.top.register_forward_pre_hook(_before(parts), with_kwargs=True))
        self.handles.append(parts.top.register_forward_hook(_after(parts), with_kwargs=True, always_call=True))
        self.handles.append(parts.decoder.register_forward_pre_hook(_enter_decoder(parts), with_kwargs=True))
        for layer, block in parts.blocks.items():
            self.handles.append(block.register_forward_pre_hook(_enter_block(parts, layer), with_kwargs=True))
        for layer, attention in parts.tower.items():
            self.handles.append(attention.register_forward_pre_hook(_enter_vision(parts, layer), with_kwargs=True))

    def remove(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for config, name in self.saved:
            config._attn_implementation = name


@contextlib.contextmanager
def installed(model: nn.Module, require_pictures: bool = True) -> Iterator[Parts]:
    """Installs on a model for as long as the context lives; reference-counted, the last leaver restores exactly.

    Args:
        model: a model of AutoModelForImageTextToText.
        require_pictures: refuse text-only models.
    """
    parts = acquire(model, require_pictures)
    try:
        yield parts
    finally:
        release(model)


def acquire(model: nn.Module, require_pictures: bool = True) -> Parts:
    """Installs on a model, or counts one more user; pair with `release`."""
    with LOCK:
        installation = _INSTALLED.get(model)
        if installation is None:
            installation = _INSTALLED[model] = _Installation(model, require_pictures)
        installation.users += 1
        return installation.parts


def release(model: nn.Module) -> None:
    """One user fewer; the last one restores the model."""
    with LOCK:
        installation = _INSTALLED[model]
        installation.users -= 1
        if installation.users == 0:
            del _INSTALLED[model]
            installation.remove(model)


@contextlib.contextmanager
def serving(request: Request | None) -> Iterator[None]:
    """Makes a request the current one of this thread or task."""
    token = REQUEST.set(request)
    try:
        yield
    finally:
        REQUEST.reset(token)


def _implementations(model: Any) -> list[tuple[Any, str | None]]:
    """Every configuration of the model with the attention implementation it names."""
    config = model.config
    names = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]
    return [(c, c._attn_implementation) for c in names if c is not None and hasattr(c, "_attn_implementation")]


def _select(model: Any) -> None:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    original = text._attn_implementation or "sdpa"
    if original not in attend.NAMES:
        raise Refusal(
            f"{type(model).__name__} uses attention implementation {original!r}, which vlmfix cannot delegate to; "
            f"load the model with attn_implementation='sdpa'"
        )
    key = [k for k in config.sub_configs if getattr(config, k, None) is text]
    name = attend.NAMES[original]
    model.set_attn_implementation({key[0]: name} if key else name)


def _current(parts: Parts) -> Request | None:
    request = REQUEST.get()
    return request if request is not None and request.parts is parts else None


def _before(parts: Parts) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        request = _current(parts)
        if args and (request is not None or OPEN):
            names = inspect.signature(module.forward).parameters
            args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
        if request is None and OPEN:
            request = OPEN[0](parts, kwargs)
            if request is not None:
                _OPENED.set((*_OPENED.get(), (parts, REQUEST.set(request))))
        elif _opened(parts):  # a forward within the one that opened the request
            _OPENED.set((*_OPENED.get(), (parts, None)))
        if request is None:
            return None
        return args, request.before(kwargs)

    return hook


_OPENED: ContextVar[tuple[tuple[Parts, Any], ...]] = ContextVar("vlmfix_opened", default=())
"""Running forwards under a request that a forward opened: the model, and the token that ends the request."""


def _opened(parts: Parts) -> bool:
    stack = _OPENED.get()
    return bool(stack) and stack[-1][0] is parts


def _after(parts: Parts) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        request = _current(parts)
        if request is None:
            return output
        try:
            if output is None:
                return output
            output = request.after(output)
            if _opened(parts) and output.get("past_key_values") is not None:
                output["past_key_values"].state = request
            return output
        finally:
            if _opened(parts):
                *rest, (_, token) = _OPENED.get()
                _OPENED.set(tuple(rest))
                if token is not None:
                    REQUEST.reset(token)

    return hook


def _enter_decoder(parts: Parts) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        request = _current(parts)
        if request is None:
            return None
        cache = kwargs.get("past_key_values")
        entry: Any = kwargs.get("inputs_embeds")
        if entry is None:
            entry = kwargs.get("input_ids", args[0] if args else None)
        past = cache.get_seq_length() if cache is not None else 0
        request.step(entry.shape[0], entry.shape[1], past, entry.device)
        return args, {**request.entering(kwargs), attend.STATE: request}

    return hook


def _enter_block(parts: Parts, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = _current(parts)
        if request is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        entering = request.observe(layer, hidden)
        if entering is hidden:
            return None
        return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

    return hook


def _enter_vision(parts: Parts, layer: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        request = _current(parts)
        if request is not None:
            request.see(layer, module, args[0] if args else kwargs["hidden_states"])

    return hook
