"""The product of a gated layer: check, choose, call."""

from __future__ import annotations

from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.silu_mul import reference


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Silu(gate) * up; arguments and result as in `reference.silu_mul`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: expected equal shapes")
    if not use_triton(gate, up) or gate.dtype != up.dtype or gate.requires_grad or up.requires_grad:
        return reference.silu_mul(gate, up)
    from vlmfix.kernels.silu_mul import triton

    return triton.silu_mul(gate.contiguous(), up.contiguous())
