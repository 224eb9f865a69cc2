"""Observers of attention: what a recorder measures beside whatever a recipe does."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from vlmfix.hf.attend import Look
from vlmfix.layout import Layout
from vlmfix.method import LayerContext, ModelFacts
from vlmfix.plan import Plan


class Observation(Protocol):
    """One generation as a recorder keeps it."""

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads the residual stream of the prompt in every layer."""
        ...

    def read(self, layer: int, layout: Layout, hidden: Tensor, past: int) -> None:
        """[B, Q, width] residual stream entering a layer while the prompt is read, from slot `past` on."""
        ...

    def watch(self, context: LayerContext, look: Look, plans: Sequence[Plan], at: int, rows: int) -> None:
        """Measures the attention of the query that predicts the next token.

        Args:
            context: the layer; its notes and memory belong to the observation.
            look: the attention of the forward.
            plans: what the recipe does to it.
            at: index of that query.
            rows: number of the caller's rows, which come first.
        """
        ...


class Observer(Protocol):
    """Opens an observation for every generation of one model."""

    @property
    def model(self) -> Any:
        """The model."""
        ...

    def open(self, model: Any, facts: ModelFacts) -> Observation | None:
        """None for other models."""
        ...


OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("vlmfix_observers", default=())
"""Recorders of this thread or task."""


def watched(model: Any) -> bool:
    """Whether a recorder of this thread or task watches the model."""
    return any(observer.model is model for observer in OBSERVERS.get())


def open_all(model: Any, facts: ModelFacts) -> tuple[Observation, ...]:
    """Observations of a generation that begins."""
    opened = (observer.open(model, facts) for observer in OBSERVERS.get())
    return tuple(observation for observation in opened if observation is not None)
