"""The product of a gated layer: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Silu(gate) * up, silu rounded to its dtype before the product.

    Args:
        gate: [..., D].
        up: [..., D].

    Returns:
        [..., D].
    """
    return silu(gate) * up


def silu_mul_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up for C gradients of the result: grad * up * s (1 + gate (1 - s)) and grad * gate * s.

    S is the sigmoid of the gate; only the results are rounded.

    Args:
        grad: [C, ..., D].
        gate: [..., D].
        up: [..., D].

    Returns:
        [C, ..., D] each, in gate's and up's dtype.
    """
    dtype = torch.promote_types(gate.dtype, torch.float32)
    g, x = grad.to(dtype), gate.to(dtype)
    s = x.sigmoid()
    return (g * up.to(dtype) * (s * (1 + x * (1 - s)))).to(gate.dtype), (g * (x * s)).to(up.dtype)
