"""A cache of fixed size whose state lives on the device, so that one captured step can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from vlmfix.kernels.grouped_attention import prepared
from vlmfix.kernels.grouped_attention.pack import Packed
from vlmfix.kernels.kv_write import kv_write
from vlmfix.layout import NEVER
from vlmfix.plan import Plan


@dataclass(frozen=True)
class Seen:
    """What a step's query sees of one layer's keys: those at slots low <= s < high.

    Args:
        k_pos: [K] slots of the keys; `NEVER` where nothing was written.
        low: [B, 1].
        high: [B, 1].
        consecutive: whether k_pos counts up by one.
        at: [1] where among them the query's own key is.
    """

    k_pos: Tensor
    low: Tensor
    high: Tensor
    consecutive: bool
    at: Tensor

    @cached_property
    def mask(self) -> Tensor:
        """[B, 1, 1, K] bool."""
        return ((self.k_pos >= self.low) & (self.k_pos < self.high))[:, None, None]

    @cached_property
    def own(self) -> Tensor:
        """[B] slot of the query."""
        return (self.high - 1)[:, 0]


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer at fixed addresses.

    Args:
        keys: [B, Hkv, C, D].
        values: [B, Hkv, C, Dv].
        slot: [1] int64 slot of the token that is written next, moved by the engine.
        window: keys that a query sees, its own among them; the buffer is then a ring of so many. None for all.
        fed: key and value of the token that was written last, where gradients run through them; `Tracer` drops them.
        at: [1] where that token is written; a window's is set by `Frame.begin`.
    """

    is_compileable = True
    fed: tuple[Tensor, Tensor] | None = None

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor, window: int | None) -> None:
        super().__init__()
        self.keys, self.values, self.slot, self.window = keys, values, slot, window
        self.at = slot
        self._places = torch.arange(self.capacity, device=slot.device)
        self.is_sliding = window is not None
        self.is_initialized = True

    @property
    def capacity(self) -> int:
        """C."""
        return int(self.keys.shape[2])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes one token and returns the whole buffers."""
        if torch.is_grad_enabled() and key_states.requires_grad:
            self.fed = key_states, value_states
            key_states, value_states = key_states.detach(), value_states.detach()
        kv_write(self.keys, self.values, key_states, value_states, self.at)
        return self.keys, self.values

    def traced(self) -> tuple[Tensor, Tensor]:
        """Copies of the buffers, in which gradients run through the token that was written last."""
        assert self.fed is not None
        key, value = self.fed
        return self.keys.index_copy(2, self.at, key), self.values.index_copy(2, self.at, value)

    def take(self, layer: Any, length: int) -> None:
        """Takes over a growing layer, which holds the last of the first `length` slots and is empty afterwards."""
        keys, values = layer.keys, layer.values
        layer.keys = layer.values = None
        first = length - keys.shape[2]
        if self.window is None:
            for mine, theirs in ((self.keys, keys), (self.values, values)):
                if not _within(theirs, mine):
                    mine[:, :, first:length] = theirs
            self.values[:, :, length:] = 0  # an earlier text's, which would show if they were infinite
            return
        self.values.zero_()
        kept = min(keys.shape[2], self.window)
        at = torch.arange(length - kept, length, device=keys.device) % self.window
        self.keys.index_copy_(2, at, keys[:, :, keys.shape[2] - kept :])
        self.values.index_copy_(2, at, values[:, :, values.shape[2] - kept :])

    def seen(self, start: Tensor) -> Seen:
        """What the next token sees, itself included.

        Args:
            start: [B, 1] first slot that is no padding.
        """
        high = (self.slot + 1).expand_as(start).contiguous()
        if self.window is None:
            return Seen(self._places, start, high, True, self.slot)
        slots = self.slot - (self.slot - self._places) % self.window
        k_pos, low = torch.where(slots < 0, NEVER, slots), torch.maximum(start, high - self.window)
        return Seen(k_pos, low, high, False, self.slot % self.window)

    def get_seq_length(self) -> Any:
        """Slots written so far, as a tensor []."""
        return self.slot[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All of the buffer."""
        return self.capacity, 0

    def get_max_length(self) -> int:
        """C."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """C."""
        return self.capacity


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A growing layer that grows within a buffer, so that a cache of fixed size can take it over without a copy.

    Args:
        capacity: slots of the buffer; what outgrows it grows as usual.
        lent: the layer of a cache of fixed size that is not in use, whose buffers serve where they fit.
    """

    def __init__(self, capacity: int, lent: SlotLayer | None = None) -> None:
        super().__init__()
        self.capacity, self._lent = capacity, lent
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def own(self) -> tuple[Tensor, Tensor] | None:
        """The buffers, where they are its own and hold what it holds."""
        if self._buffers is None or self._lent is not None or not self._inside:
            return None
        return self._buffers

    @property
    def _inside(self) -> bool:
        assert self._buffers is not None
        pairs = zip((self.keys, self.values), self._buffers, strict=True)
        return all(_within(x, buffer) or not x.numel() for x, buffer in pairs)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds keys and values and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = self._made(key_states, value_states)
        past = self.get_seq_length()
        end = past + key_states.shape[2]
        if self._buffers is None or end > self.capacity or not self._inside:
            self._buffers = None
            out: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return out
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _made(self, *states: Tensor) -> tuple[Tensor, Tensor] | None:
        """Buffers for such keys and values; None where there is no memory for more than these."""
        shapes = [(*x.shape[:2], self.capacity, x.shape[3]) for x in states]
        if self._lent is not None:
            lent = (self._lent.keys, self._lent.values)
            alike = ((y.shape, y.dtype, y.device, y.is_inference()) for y in lent)
            mode = torch.is_inference_mode_enabled()
            if all(a == (s, x.dtype, x.device, mode) for a, s, x in zip(alike, shapes, states, strict=True)):
                return lent
            self._lent = None
        try:
            keys, values = (x.new_zeros(shape) for x, shape in zip(states, shapes, strict=True))
        except torch.OutOfMemoryError:
            return None
        return keys, values


def _within(part: Tensor, buffer: Tensor) -> bool:
    """Whether a tensor is the first slots of a buffer."""
    same = part.data_ptr() == buffer.data_ptr() and part.stride() == buffer.stride()
    return same and part.shape[:2] == buffer.shape[:2]


def reserve(cache: Any, capacity: int, lent: SlotCache | None) -> None:
    """Lets an empty growing cache grow within buffers of `capacity` slots, those of another cache if they fit.

    Layers with a window, and layers that hold something already, stay as they are.
    """
    layers = getattr(cache, "layers", [])
    if any(getattr(layer, "is_initialized", True) for layer in layers):
        return
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer(capacity, None if lent is None else lent.layers[i])


class SlotCache(Cache):  # type: ignore[misc]
    """Layers of fixed size; their clock is moved by the engine, not by `update`."""

    @staticmethod
    def of(cache: Any, capacity: int, slot: Tensor) -> SlotCache:
        """Buffers that take over a growing cache, layer by layer so that no more than one is there twice.

        Args:
            cache: after a prefill; every layer holds keys. It is empty afterwards.
            capacity: most slots.
            slot: [1] int64, the clock.
        """
        layers, length = [], cache.get_seq_length()
        for layer in cache.layers:
            window = getattr(layer, "sliding_window", None)
            window = window if window is not None and window < capacity else None
            size = capacity if window is None else window
            shapes = ((*x.shape[:2], size, x.shape[3]) for x in (layer.keys, layer.values))
            own = layer.own if isinstance(layer, GrowingLayer) and layer.capacity == size else None
            keys, values = own or (layer.keys.new_zeros(shape) for shape in shapes)
            layers.append(SlotLayer(keys, values, slot, window))
            layers[-1].take(layer, length)
        return SlotCache(layers=layers)

    def fill(self, cache: Any, length: int) -> None:
        """Takes over what a growing cache of `length` slots still holds; it is empty afterwards."""
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            if theirs.keys is not None:
                mine.take(theirs, length)


class Frame:
    """Where a replayed step stands, as tensors at fixed addresses.

    Args:
        cache: of fixed size.
        slot: [1] int64 slot of the token that is fed.
        start: [B, 1] int64 first slot of each row that is no padding.
        number: [] int64, 1 for the first generated token, of the token that the step yields.
        nothing: a plan that changes nothing, for layers without another.
    """

    def __init__(self, cache: SlotCache, slot: Tensor, start: Tensor, number: Tensor) -> None:
        self.cache, self.slot, self.start, self.number = cache, slot, start, number
        never = torch.full_like(start[:, 0], NEVER)
        self.nothing = Plan(torch.zeros(len(start), 1, dtype=torch.uint8, device=start.device), 1, never)
        self.plans: dict[int, tuple[tuple[Plan, ...], Packed | None]] = {}
        self._kinds: dict[int | None, SlotLayer] = {layer.window: layer for layer in reversed(cache.layers)}
        self._seen: dict[int | None, Seen] = {}

    def prepare(self, plans: Mapping[int, tuple[Plan, ...]], heads: Mapping[int, int]) -> None:
        """Fixes the plans of layers once and for all.

        Args:
            plans: of each layer.
            heads: layer -> H.
        """
        for layer, on in plans.items():
            cached, on = self.cache.layers[layer], on or (self.nothing,)
            self.plans[layer] = on, prepared(cached.keys, cached.values, on, heads[layer])

    def begin(self) -> None:
        """A step begins: what is seen is worked out once for all layers of one kind."""
        self._seen = {window: layer.seen(self.start) for window, layer in self._kinds.items()}
        for layer in self.cache.layers:
            layer.at = self._seen[layer.window].at

    @property
    def answer(self) -> Tensor:
        """[1] int64 slot of the first generated token."""
        return self.slot - self.number + 2

    def seen(self, layer: int) -> Seen:
        """What a layer's query sees."""
        found: SlotLayer = self.cache.layers[layer]
        return self._seen[found.window]


MARK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""A ready-made mask, so that models build none; attention over slots does not read it."""


def why_not(cache: Any, depth: int) -> str:
    """Why a growing cache cannot become one of fixed size; empty where it can.

    Args:
        cache: after a prefill.
        depth: L.
    """
    if len(cache.layers) != depth or any(not isinstance(getattr(x, "keys", None), Tensor) for x in cache.layers):
        return "some layers keep no keys of their own"
    return ""
