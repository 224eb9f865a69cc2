"""A recipe compiled for one model: the only thing the engine's state reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlmfix.errors import Refusal
from vlmfix.method import AnswerMethod, AttentionMethod, DecodingMethod, ModelFacts, PictureMethod
from vlmfix.view import View


@dataclass(frozen=True)
class Compiled:
    """What acts, where, in which order; decided once and nowhere else.

    Args:
        attention: attention methods in the order of the recipe.
        layers: per attention method, the layers it acts on.
        decoding: the method that rewrites logits, if any.
        facts: the model it was compiled for.
        dropped: names of neutral methods that were left out.
        own: places of the attention methods that belong to the decoding method.
        pictures: methods that redraw pictures, in order, before the rest sees them.
        answer: the method that settles whole answers, if any.
    """

    attention: tuple[AttentionMethod, ...]
    layers: tuple[frozenset[int], ...]
    decoding: DecodingMethod | None
    facts: ModelFacts
    dropped: tuple[str, ...] = ()
    own: tuple[int, ...] = ()
    pictures: tuple[PictureMethod, ...] = ()
    answer: AnswerMethod | None = None

    @property
    def plain(self) -> bool:
        """Whether nothing acts, so that the model runs untouched."""
        return not self.attention and self.decoding is None

    @cached_property
    def views(self) -> tuple[View, ...]:
        """One view per branch."""
        return () if self.decoding is None else self.decoding.branches()

    @property
    def prefix_plain(self) -> bool:
        """Whether the prompt up to its last picture runs as in the plain model, so that rows can share it."""
        return not self.views and not self.late and all(method.prefix_plain for method in self.attention)

    @cached_property
    def probes(self) -> tuple[View, ...]:
        """Views whose rows run in the prefill alone."""
        return () if self.decoding is None else self.decoding.probes()

    @cached_property
    def reads(self) -> tuple[Any, View] | None:
        """A text-only language model that reads along, and what of the prompt it reads."""
        return None if self.decoding is None else self.decoding.reads()

    @property
    def late(self) -> bool:
        """Whether a branch waits for the visible rows' prefill."""
        return self.decoding is not None and self.decoding.late()

    @cached_property
    def taps(self) -> frozenset[int]:
        """Layers whose entering residual stream the decoding method reads at every step."""
        return frozenset() if self.decoding is None else frozenset(self.decoding.taps(self.facts.depth))

    @cached_property
    def saliency_layers(self) -> tuple[int, ...]:
        """Target layers of the saliency the decoding method asks for."""
        return () if self.decoding is None else self.decoding.saliency_layers(self.facts.depth)

    @cached_property
    def watched_layers(self) -> frozenset[int]:
        """Layers whose attention some method looks at."""
        return frozenset().union(*(method.watches(self.facts.depth) for method in self.attention))

    @cached_property
    def stepwise_layers(self) -> frozenset[int]:
        """Layers whose attention some method looks at in every step."""
        stepwise = (method.watches(self.facts.depth) for method in self.attention if method.watches_steps)
        return frozenset().union(*stepwise)

    @cached_property
    def without_pictures(self) -> View | None:
        """How a prompt reads without pictures, where some method's head rules compare the two."""
        return next((view for method in self.attention if (view := method.without_pictures())), None)

    @property
    def packed(self) -> bool:
        """Whether that prompt runs as copies of text in the same rows; in rows of its own otherwise."""
        comparing = [method for method in self.attention if method.without_pictures()]
        return self.facts.packable and all(method.scales_text for method in comparing)

    def __post_init__(self) -> None:
        """Refuses methods that would take the prefill apart in two ways."""
        if self.splits and (self.without_pictures is not None or self.late):
            raise Refusal(
                "two methods of this recipe take the reading of the prompt apart in different ways (one runs its last "
                "token by itself, the other a second prompt beside it); choose one, or layers that need no split"
            )

    @cached_property
    def splits(self) -> bool:
        """Whether the last prompt token runs by itself."""
        return any(method.splits_prefill(self.facts.depth) for method in self.attention)

    @cached_property
    def vision_layers(self) -> frozenset[int]:
        """Vision layers whose class-token attention some method reads."""
        return frozenset().union(*(method.vision_layers for method in self.attention))

    @cached_property
    def reading_layers(self) -> frozenset[int]:
        """Layers whose residual stream some method reads in prefill."""
        reading = (layers for method, layers in zip(self.attention, self.layers, strict=True) if method.reads_hidden)
        return frozenset().union(*reading)
