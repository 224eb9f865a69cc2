"""Pictures asked about again are not encoded again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.utils import ModelOutput

from vlmfix.hf.parts import Parts

ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters")
"""What peft's layers keep beside their weights; merging writes to weights in a way that does not count as one."""


@dataclass
class Memory:
    """The last batch of encoded pictures: content of the encoder's inputs, what it returned, what was read off.

    Args:
        key: content of the inputs.
        weights: state of the weights, as `_state` tells it.
        value: what the encoder returned.
        notes: what was read off the tower by layer.
    """

    key: str = ""
    weights: list[Any] = field(default_factory=list)
    value: Any = None
    notes: dict[int, Tensor] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy begins empty: its model has weights of its own, and weak references to storages cannot be copied."""
        return Memory, ()


_MEMORY: ContextVar[Memory | None] = ContextVar("vlmfix_encoded", default=None)
_LOCK = threading.RLock()
_USERS: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def once(parts: Parts, memory: Memory) -> Iterator[None]:
    """Within the context, this thread's forwards reuse the encoding of pictures equal to the last ones.

    Nothing is reused once weights outside the decoder's blocks were replaced or written to. Writes to `weight.data`
    in place go unseen: torch does not count them.

    Args:
        parts: the model; nothing happens for families without `get_image_features`.
        memory: kept by the caller from one generation to the next.
    """
    model = parts.model
    owner = next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_image_features")), None)
    if owner is None or model.training:
        yield
        return
    weights = _state(parts)
    if memory.weights != weights:
        memory.key, memory.weights = "", weights
    token = _MEMORY.set(memory)
    _enter(owner)
    try:
        yield
    finally:
        _leave(owner)
        _MEMORY.reset(token)


def notes() -> dict[int, Tensor]:
    """What was read off the tower by layer when the remembered pictures were encoded; kept with them."""
    memory = _MEMORY.get()
    return {} if memory is None else memory.notes


def _state(parts: Parts) -> list[Any]:
    """Where the weights outside the decoder's blocks lie, how often each was written to, and which adapters act."""
    state: list[Any] = []
    for _, module in parts.model.named_modules(memo=set(parts.blocks.values())):
        state += [_place(weight) for weight in module._parameters.values() if weight is not None]
        if any(name in vars(module) for name in ADAPTERS):
            state.append(repr([vars(module).get(name) for name in ADAPTERS]))
    return state


def _place(weight: Tensor) -> tuple[Any, ...]:
    version = 0 if weight.is_inference() else weight._version
    try:  # addresses are used again; a weak reference that is kept is not
        return StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), version
    except (RuntimeError, NotImplementedError):  # kinds of tensors that have no storage of their own
        return id(weight), version


def _enter(owner: Any) -> None:
    with _LOCK:
        users = _USERS.setdefault(owner, [0])
        if users[0] == 0:
            owner.get_image_features = _remembering(type(owner).get_image_features, weakref.ref(owner))
        users[0] += 1


def _leave(owner: Any) -> None:
    with _LOCK:
        _USERS[owner][0] -= 1
        if _USERS[owner][0] == 0:
            del owner.get_image_features
            del _USERS[owner]


def _remembering(original: Any, owner: Any) -> Any:
    @functools.wraps(original.__get__(owner()))
    def encode(*args: Any, **kwargs: Any) -> Any:
        memory = _MEMORY.get()
        if memory is None:
            return original(owner(), *args, **kwargs)
        key = _content(args, kwargs)
        if memory.key != key:
            memory.notes.clear()
            memory.value = _slim(original(owner(), *args, **kwargs), kwargs)
            memory.key = key
        return _own(memory.value)

    return encode


def _slim(value: Any, kwargs: dict[str, Any]) -> Any:
    """What is worth remembering: states and attentions of all layers, unless asked for, outweigh the rest."""
    if isinstance(value, ModelOutput):
        for name in ("hidden_states", "attentions"):
            if value.get(name) is not None and not kwargs.get(f"output_{name}"):
                value[name] = None
    return value


def _own(value: Any) -> Any:
    """A copy that generate may change: it replaces fields in place when it repeats rows."""
    if isinstance(value, ModelOutput):
        mine = type(value)(**{k: list(v) if isinstance(v, list) else v for k, v in value.items()})
        for name, extra in vars(value).items():  # some families of older releases set what is no field
            if name not in mine:
                object.__setattr__(mine, name, list(extra) if isinstance(extra, list) else extra)
        return mine
    return list(value) if isinstance(value, list) else value


def _content(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        digest.update(str(name).encode())
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, Tensor):
                digest.update(str((part.shape, part.dtype)).encode())
                digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
            else:
                digest.update(repr(part).encode())
    return digest.hexdigest()
