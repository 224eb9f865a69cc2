"""The registered attention function: the model's own attention, except on rows that a plan changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from vlmfix.hf.slots import Frame, SlotLayer
from vlmfix.hf.tracing import attend_one
from vlmfix.kernels.grouped_attention import CHUNK, grouped_attention, served
from vlmfix.kernels.grouped_attention.reference import probabilities
from vlmfix.plan import Plan

STATE = "vlmfix"
"""Keyword under which the decoder's pre-hook hands the request to the attention function."""

NAMES = {"sdpa": "vlmfix", "eager": "vlmfix_math"}
"""Original attention implementation -> ours, which delegates to it and builds the same masks."""


@dataclass(frozen=True)
class Look:
    """The attention of one layer in one forward, recomputed row by row on demand.

    Args:
        query: [B, H, Q, D].
        key: [B, Hkv, K, D].
        value: [B, Hkv, K, Dv].
        mask: as transformers made it, or None.
        scale: factor on q.k.
        q_pos: [Q] slots of the queries.
        how: softcap, sinks and causal.
        slots: [K] slots of the keys, where they do not follow from their number.
        known: "lse", "own" and "start" as `saliency_row` takes them, of a single query that was traced.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    q_pos: Tensor
    how: dict[str, Any]
    slots: Tensor | None = None
    known: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def k_pos(self) -> Tensor:
        """[K] slots of the keys: the last K of the sequence, or 0.. where the cache is longer than the sequence."""
        if self.slots is not None:
            return self.slots
        keys = self.key.shape[2]
        offset = (self.q_pos[-1] + 1 - keys).clamp(min=0)
        return offset + torch.arange(keys, device=self.q_pos.device)

    def rows(self, queries: Tensor, plans: Sequence[Plan] = ()) -> Tensor:
        """Probabilities [B, H, n, K] float32 of some queries, indices [n] for all samples or [B, n].

        Plans, if given, change the scores first; queries are then the same for all samples.
        """
        query, mask = self.query, self.mask
        if queries.dim() == 1:
            query = query[:, :, queries]
            mask = None if mask is None else mask[:, :, queries]
        else:
            index = queries[:, None, :, None]
            query = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
            if mask is not None:
                mask = mask.expand(query.shape[0], -1, -1, -1)
                mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = None if mask is None else mask[..., : self.key.shape[2]]
        slots = self.q_pos[queries]
        return probabilities(query, self.key, mask, self.scale, slots, self.k_pos, **self.how, plans=plans)

    def attend(self, at: int, plans: Sequence[Plan]) -> Tensor:
        """[B, H, 1, Dv] output of one query under plans; their sinks receive its statistics."""
        one = slice(at, at + 1)
        mask = None if self.mask is None else self.mask[:, :, one, : self.key.shape[2]]
        query, slots = self.query[:, :, one], self.q_pos[one]
        return grouped_attention(
            query, self.key, self.value, plans, mask, self.scale, slots, self.k_pos, consecutive=True, **self.how
        )


@dataclass(frozen=True)
class Tail:
    """Queries at the end of a prefill that belong to no row of the caller.

    Args:
        start: slot of the first.
        plans: what they follow in every layer, instead of the recipe's.
    """

    start: int
    plans: tuple[Plan, ...]


class Request(Protocol):
    """What the attention function asks of the state of one generation."""

    @property
    def tail(self) -> Tail | None:
        """Queries of this forward that follow plans of their own."""
        ...

    @property
    def frame(self) -> Frame | None:
        """The step of a cache of fixed size that is running, if one is."""
        ...

    def watches(self, layer: int) -> bool:
        """Whether any method looks at a layer's attention."""
        ...

    @property
    def q_pos(self) -> Tensor:
        """[Q] slots of the current queries."""
        ...

    @property
    def past(self) -> int:
        """Slot of the first current query."""
        ...

    def visit(self, layer: int, look: Look) -> tuple[tuple[Plan, ...], int]:
        """Plans of a layer and the first query position any of them changes."""
        ...

    def finish(self, layer: int, out: Tensor) -> Tensor:
        """Last word on the layer's output [B, Q, H, D] (head rules)."""
        ...


def register() -> None:
    """Registers attention and mask functions under our names; called at installation, never at import."""
    AttentionInterface.register(NAMES["sdpa"], _attend_sdpa)
    AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
    AttentionInterface.register(NAMES["eager"], _attend_eager)
    AttentionMaskInterface.register(NAMES["eager"], eager_mask)


def _attend_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> Any:
    return _attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, attention_mask, kw)


def _attend_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
) -> Any:
    original = sys.modules[type(module).__module__].eager_attention_forward
    return _attend(original, module, query, key, value, attention_mask, kw)


def _blocks(look: Look, start: int, end: int, plans: tuple[Plan, ...]) -> Iterator[tuple[int, int, tuple[Plan, ...]]]:
    """Rows start .. end - 1 in the pieces that are evaluated at once."""
    rows = CHUNK
    if start < end and served(look.query, look.key, look.value, plans):
        rows = end - start
    for a in range(start, end, rows):
        yield a, min(a + rows, end), plans


def _attend(
    original: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kw: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    request: Request | None = kw.pop(STATE, None)
    layer = getattr(module, "layer_idx", None)
    if request is None or layer is None:
        return original(module, query, key, value, mask, **kw)  # type: ignore[no-any-return]
    scale = kw.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    causal = kw.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    how: dict[str, Any] = {"softcap": kw.get("softcap"), "sinks": kw.get("s_aux"), "causal": causal}
    if request.frame is not None:
        return _attend_slots(request, request.frame, layer, query, key, value, scale, {**how, "causal": False}), None
    queries, tail = query.shape[2], request.tail
    skipped = len(request.q_pos) - queries  # some decoders run only the last token through their upper layers
    past, slots = request.past + skipped, request.q_pos[skipped:]
    look = Look(query, key, value, mask, scale, slots, how)
    plans, first = request.visit(layer, look)
    end = queries if tail is None else min(tail.start - past, queries)
    start = min(max(first - past, 0), end) if plans else end
    if start == queries:
        out, weights = original(module, query, key, value, mask, **kw)
        return request.finish(layer, out), weights
    parts: list[Tensor] = []
    if start:
        parts.append(original(module, query, key, value, mask, **kw)[0][:, :start])
    tails = () if tail is None else tail.plans
    for a, b, wanted in (*_blocks(look, start, end, plans), *_blocks(look, end, queries, tails)):
        part = None if mask is None else mask[:, :, a:b, : key.shape[2]]
        out = grouped_attention(
            query[:, :, a:b], key, value, wanted, part, scale, slots[a:b], look.k_pos, consecutive=True, **how
        )
        parts.append(out.transpose(1, 2))
    out = torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()
    return request.finish(layer, out), None


def _attend_slots(
    request: Request,
    frame: Frame,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    how: dict[str, Any],
) -> Tensor:
    """One step of a cache of fixed size: [B, 1, H, Dv]; every layer runs as grouped attention, which reads no mask."""
    seen = frame.seen(layer)
    cached: SlotLayer = frame.cache.layers[layer]
    if cached.fed is not None:
        return request.finish(layer, _attend_traced(request, frame, layer, query, cached.fed, scale, how))
    if layer in frame.plans:
        plans, packed = frame.plans[layer]
    else:
        mask, packed = seen.mask if request.watches(layer) else None, None
        plans, _ = request.visit(layer, Look(query, key, value, mask, scale, frame.slot, how, seen.k_pos))
    out = grouped_attention(
        query,
        key,
        value,
        plans or (frame.nothing,),
        None,
        scale,
        frame.slot,
        seen.k_pos,
        consecutive=seen.consecutive,
        spans=(seen.low, seen.high),
        packed=packed,
        **how,
    )
    return request.finish(layer, out.transpose(1, 2).contiguous())


def _attend_traced(
    request: Request,
    frame: Frame,
    layer: int,
    query: Tensor,
    fed: tuple[Tensor, Tensor],
    scale: float,
    how: dict[str, Any],
) -> Tensor:
    """The same where gradients run through the query and its own key and value."""
    seen = frame.seen(layer)
    cached: SlotLayer = frame.cache.layers[layer]
    key, value = cached.keys, cached.values
    look = Look(query, key, value, seen.mask, scale, frame.slot, how, seen.k_pos)
    plans, _ = request.visit(layer, look)
    if plans or how["softcap"] or not seen.consecutive:
        key, value = cached.traced()
        spans = (seen.low, seen.high)
        plans = plans or (frame.nothing,)
        out = grouped_attention(query, key, value, plans, None, scale, frame.slot, seen.k_pos, spans=spans, **how)
    else:
        packed = frame.plans[layer][1] if layer in frame.plans else None
        out, known = attend_one(query, fed, key, value, frame, seen, scale, how["sinks"], packed)
        look.known.update(known)
    return out.transpose(1, 2).contiguous()
