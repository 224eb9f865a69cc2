"""Root-mean-square normalisation: check, choose, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.gradients import Together
from vlmfix.kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension; arguments and result as in `reference.rms_norm`.

    Gradients reach x alone; the weight counts as a constant.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)}: expected ({x.shape[-1]},)")
    if x.requires_grad and torch.is_grad_enabled():
        traced: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return traced
    weight = weight.detach()
    if not use_triton(x, weight) or weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps)
    from vlmfix.kernels.rms_norm import triton

    return triton.rms_norm(x.contiguous(), weight.contiguous(), eps)


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of x; arguments and result as in `reference.rms_norm_gradient`."""
    if not use_triton(grad, x, weight) or not grad.dtype == x.dtype == weight.dtype:
        return reference.rms_norm_gradient(grad, x, weight, eps)
    from vlmfix.kernels.rms_norm import triton

    return triton.rms_norm_gradient(grad.contiguous(), x.contiguous(), weight.contiguous(), eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        out = Together.apply(_gradients, (grad,), *ctx.saved_tensors, ctx.eps)  # type: ignore[no-untyped-call]
        return out[0], None, None


def _gradients(*arguments: Any) -> tuple[Tensor]:
    return (rms_norm_gradient(*arguments),)
