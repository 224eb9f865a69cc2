"""The product of a gated layer: the definition."""

from __future__ import annotations

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
