"""Gradients of many candidates at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Together(torch.autograd.Function):
    """Calls a backward once for all the gradients that `torch.vmap` batches, instead of letting it batch operations.

    `Together.apply(backward, grads, *rest)` is `backward(*(grad[None] for grad in grads), *rest)` without the results'
    first dimension, where `backward` takes gradients [C, ...] and returns a tuple of tensors [C, ...].
    """

    @staticmethod
    def forward(backward: Any, grads: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
        """One candidate."""
        return tuple(x[0] for x in backward(*(grad[None] for grad in grads), *rest))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: nobody takes gradients of gradients."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, backward: Any, grads: tuple[Tensor, ...], *rest: Any) -> Any:  # type: ignore[override]
        """All of them."""
        return backward(*(_first(x, at, info.batch_size) for x, at in zip(grads, in_dims[1], strict=True)), *rest), 0


def _first(grad: Tensor, at: int | None, count: int) -> Tensor:
    return grad.expand(count, *grad.shape) if at is None else grad.movedim(at, 0)
