"""Gradients of many candidates at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Together(torch.autograd.Function):
    """Calls a backward once for all the gradients that `torch.vmap` batches, instead of letting it batch operations.

    `Together.apply(backward, grad, *rest)` is `backward(grad[None], *rest)` without its first dimension, where
    `backward` takes gradients [C, ...] and returns a tuple of tensors [C, ...].
    """

    @staticmethod
    def forward(backward: Any, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """One gradient."""
        return tuple(x[0] for x in backward(grad[None], *rest))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept: nobody takes gradients of gradients."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, backward: Any, grad: Tensor, *rest: Any) -> Any:  # type: ignore[override]
        """All of them."""
        return backward(grad.movedim(in_dims[1], 0), *rest), 0
