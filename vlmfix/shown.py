"""What a method is shown: the model, a layer, its attention, a step of decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmfix.layout import Layout


class Rendering(Protocol):
    """How a processor renders questions and pictures."""

    def behind_picture(self, question: str) -> list[int]:
        """Token ids from the last picture to the answer, the chat template's included."""
        ...

    def question(self, ids: Sequence[int]) -> str:
        """The question within the token ids behind the last picture."""
        ...

    def within(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where the question starts and ends in these ids."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text."""
        ...

    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""
        ...

    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel that pixels in [0, 1] are normalised with."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """What a method may know about a model when a recipe is compiled.

    Args:
        family: transformers' model_type.
        depth: L, decoder layers.
        heads: layer -> H; layers without attention are absent.
        hidden_size: width of the residual stream.
        softcap: whether attention scores are soft-capped.
        prefix: whether prompt rows see text after them (no causal mask in prefill).
        crossing: whether pictures are read through cross-attention, so that they are not among the text's keys.
        sink_dims: finds the massive-activation dimensions of the residual stream, on demand.
        tokenize: text -> token ids without special tokens; absent without a processor.
        rendering: how the processor renders questions and pictures; absent without one.
        class_attention: whether the attention of the vision tower's class token can be read off.
        packable: whether text behind a picture can run without it in the same row, all layers being causal and full.
        unbranched: why no further rows can ride in a forward; empty where they can.
    """

    family: str
    depth: int
    heads: dict[int, int]
    hidden_size: int
    softcap: bool = False
    prefix: bool = False
    crossing: bool = False
    sink_dims: Any = field(default=None, repr=False, compare=False)
    tokenize: Callable[[str], list[int]] | None = field(default=None, repr=False, compare=False)
    rendering: Rendering | None = field(default=None, repr=False, compare=False)
    class_attention: bool = False
    packable: bool = True
    unbranched: str = ""


@dataclass(frozen=True)
class LayerContext:
    """One layer of one generation's prefill, as a method sees it.

    Args:
        layer: layer index.
        layout: the prompt, branch rows included.
        heads: H of the layer.
        hidden: [B, Q, width] residual stream entering the layer, for methods that read it.
        past: position of the layer's first query (more than 0 in a chunked prefill, or where a decoder runs only the
            last token through its upper layers).
        memory: the method's own notes on this layer; tensors with B rows follow beams.
        notes: the method's notes on the whole generation (see `AttentionMethod.watch`).
        facts: the model.
        seen: vision layer -> [B, K] attention of the class token to visual tokens, summed over heads; nan elsewhere.
        ids: [B, K] token ids of the prompt, if known.
    """

    layer: int
    layout: Layout
    heads: int
    hidden: Tensor | None
    past: int
    memory: dict[str, Tensor]
    notes: dict[str, Tensor]
    facts: ModelFacts
    seen: Mapping[int, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None


@dataclass(frozen=True)
class Glance:
    """The attention of one layer in one forward, to be looked at without building it.

    Args:
        context: the layer; `past` is the position of the first query.
        query: [B, H, Q, D].
        key: [B, Hkv, K, D].
        rows: recomputes attention rows: (queries [n] indices into Q, or [B, n]) -> probabilities [B, H, n, K] float32.
        k_pos: [K] sequence slots of the keys.
        value: [B, Hkv, K, Dv].
    """

    context: LayerContext
    query: Tensor
    key: Tensor
    rows: Callable[[Tensor], Tensor]
    k_pos: Tensor
    value: Tensor


@dataclass(frozen=True)
class Step:
    """One step of decoding, as a decoding method sees it.

    Args:
        number: 1 for the first generated token; a tensor [] in steps that are captured once and replayed.
        branches: per branch [B, V] float32 raw logits.
        tapped: the layers of `DecodingMethod.taps`, ascending.
        notes: the method's own notes; tensors with B rows follow them.
        saliency: candidates [B, C] -> saliency score [B, C] on the answer so far (see `saliency_layers`); absent at the
            first token.
        early: logits [C, B, V] float32 of the residual stream entering each tapped layer, read off in one product; the
            argument says whether the model's final norm comes first.
        table: (seed, count) -> `draws` [steps, count] of all steps, in steps that are captured.
    """

    number: int | Tensor
    branches: tuple[Tensor, ...]
    tapped: tuple[int, ...]
    early: Callable[[bool], Tensor]
    notes: dict[str, Tensor] = field(default_factory=dict)
    saliency: Callable[[Tensor], Tensor] | None = None
    table: Callable[[int, int], Tensor] | None = None

    def uniforms(self, seed: int, count: int, rows: int) -> Tensor:
        """[rows, count] uniforms of this step, the same for every row and batch."""
        if isinstance(self.number, int):
            return draws(seed, self.number, count).expand(rows, count)
        assert self.table is not None
        return self.table(seed, count).index_select(0, self.number[None]).expand(rows, count)


def draws(seed: int, number: int, count: int) -> Tensor:
    """[count] uniforms of one step, on the CPU."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
