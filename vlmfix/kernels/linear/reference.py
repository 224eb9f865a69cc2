"""Products of a few rows with weight matrices: the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Several linear layers of one input: x W^T + b each.

    Args:
        x: [..., D].
        weights: [N_i, D] each.
        biases: [N_i] or None each.

    Returns:
        [..., N_i] each.
    """
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def linears_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Gradient of x for C gradients of the results: the sum of g_i W_i.

    Args:
        grads: [C, ..., N_i] each.
        weights: [N_i, D] each.

    Returns:
        [C, ..., D].
    """
    return torch.stack([grad @ weight for grad, weight in zip(grads, weights, strict=True)]).sum(0)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The inner part of a gated layer: silu(x gate^T) * (x up^T), both products and silu rounded to x's dtype.

    Args:
        x: [..., D].
        gate: [N, D].
        up: [N, D].

    Returns:
        [..., N].
    """
    return silu(linear(x, gate)) * linear(x, up)
