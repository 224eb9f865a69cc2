"""The product of a gated layer: check, choose, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.gradients import Together
from vlmfix.kernels.silu_mul import reference


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Silu(gate) * up; arguments and result as in `reference.silu_mul`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: expected equal shapes")
    if gate.dtype != up.dtype or torch.compiler.is_compiling():
        return reference.silu_mul(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        traced: Tensor = _Product.apply(gate, up)  # type: ignore[no-untyped-call]
        return traced
    if not use_triton(gate, up):
        return reference.silu_mul(gate, up)
    from vlmfix.kernels.silu_mul import triton

    return triton.silu_mul(gate.contiguous(), up.contiguous())


def silu_mul_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; arguments and results as in `reference.silu_mul_gradient`."""
    if not use_triton(grad, gate, up) or not grad.dtype == gate.dtype == up.dtype:
        return reference.silu_mul_gradient(grad, gate, up)
    from vlmfix.kernels.silu_mul import triton

    return triton.silu_mul_gradient(grad.contiguous(), gate.contiguous(), up.contiguous())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_mul(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return Together.apply(silu_mul_gradient, (grad,), *ctx.saved_tensors)  # type: ignore[no-untyped-call]
