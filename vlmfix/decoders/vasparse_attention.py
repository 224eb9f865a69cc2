"""VASparse's attention part: keys that every later query looks at are raised less than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.errors import Refusal
from vlmfix.method import (
    AttentionMethod,
    Glance,
    LayerContext,
    LayerSpec,
    Method,
    ModelFacts,
    check_range,
    resolve_layers,
)
from vlmfix.plan import Plan

CHUNK = 64


@dataclass(frozen=True)
class VASparseAttention(AttentionMethod):
    """The sink penalty of VASparse, without its token selection and without its contrast.

    "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification", arXiv
    2501.06553, eq. 7: with w = softmax over keys of the attention each key has received so far, from the current query
    too, every score of the current query becomes (1 + beta (1 - w_j)) z_j, head by head. With hundreds of keys w is
    nearly zero but for strong sinks, so this sharpens attention by 1 + beta and spares the sinks. The released code
    computes none of it. Which queries are changed is not stated either: here those that predict a token. The attention
    received is that of the layer's own scores, before any method changed them. The sum needs the cache.

    Args:
        beta: strength; 0 is neutral. Published: 0.1.
        layers: fractions of depth, or exact indices; the paper names none, all is a guess.
    """

    scales_scores: ClassVar[bool] = True
    needs_picture: ClassVar[bool] = False
    replans_here: ClassVar[bool] = True
    follows_rows: ClassVar[bool] = True

    beta: float = 0.1
    layers: LayerSpec = (0.0, 1.0)

    def neutral(self) -> bool:
        """No penalty."""
        return self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the range."""
        check_range(self, "beta", 0, 10)
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers."""
        return resolve_layers(self.layers, depth)

    def watches(self, depth: int) -> tuple[int, ...]:
        """Its own layers."""
        return self.acts_on(depth)

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Adds the attention that keys receive from this forward's queries."""
        context = glance.context
        layout, memory, slots = context.layout, context.memory, glance.k_pos
        first, queries = context.past, glance.query.shape[2]
        length = max(first + queries, glance.key.shape[2])
        if first < layout.length:  # in the prompt, where rows may be padding or no rows of the caller's
            queries = min(queries, layout.length - first)
        seen = memory.get("received")
        if seen is not None and first == 0:
            raise Refusal("vasparse_attention adds up what keys received and needs the cache; set use_cache=True")
        received = glance.query.new_zeros(*glance.query.shape[:2], length, dtype=torch.float32)
        if seen is not None:
            received[..., : seen.shape[-1]] = seen
        there = pad(layout.valid, (0, max(length - layout.length, 0)), value=True)[:, :length]
        for start in range(0, queries, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, queries), device=slots.device)
            weight = there[:, first + start : first + start + len(rows)].float()
            received[..., slots] += torch.einsum("bhqk,bq->bhk", glance.rows(rows), weight)
        memory["received"] = received
        memory["there"] = there & (torch.arange(length, device=there.device) < first + queries)
        return True

    def plan(self, context: LayerContext) -> Plan | None:
        """A slope per key and head, for the query at hand."""
        received = context.memory["received"]
        slope = 1 + self.beta * (1 - share(received, context.memory["there"]))
        none = torch.zeros(len(received), received.shape[-1], dtype=torch.uint8, device=received.device)
        return Plan(none, 1, active_from=context.layout.last, key_slope=slope)


def share(received: Tensor, there: Tensor) -> Tensor:
    """Eq. 7: softmax over keys of the attention they received.

    Args:
        received: [B, H, K] column sums.
        there: [B, K] bool, keys that exist and are no padding; the others get 0.
    """
    return received.masked_fill(~there[:, None], float("-inf")).softmax(-1)
