"""Rotary position embedding of queries and keys: check, choose, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.gradients import Together
from vlmfix.kernels.rotary import reference


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Turns queries and keys to their positions; arguments and results as in `reference.rotary`.

    Gradients reach q and k alone; cos and sin count as constants.

    Raises:
        RuntimeError: shapes that do not broadcast, or mixed devices.
    """
    cos, sin = cos.detach(), sin.detach()
    if torch.compiler.is_compiling() or unsqueeze_dim != 1 or not _plain(q, k, cos, sin):  # a compiler fuses it
        return reference.rotary(q, k, cos, sin, unsqueeze_dim)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        traced: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
        return traced
    if not use_triton(q, k, cos, sin):
        return reference.rotary(q, k, cos, sin)
    from vlmfix.kernels.rotary import triton

    return triton.rotary(rows_contiguous(q), rows_contiguous(k), cos.contiguous(), sin.contiguous())


def rotary_gradients(grads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Gradients of q, of k or of both in one launch; each as in `reference.rotary_gradient`."""
    if not use_triton(*grads, cos, sin) or cos.dtype != sin.dtype or any(x.dtype != cos.dtype for x in grads):
        return tuple(reference.rotary_gradient(grad, cos, sin) for grad in grads)
    from vlmfix.kernels.rotary import triton

    return triton.rotary_gradients(grads, cos.contiguous(), sin.contiguous())


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether all are of one dtype, whole heads are turned and cos and sin repeat along the batch at most."""
    if q.dim() != 4 or k.dim() != 4 or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return False
    (batch, _, length, size), (batch_k, _, *rest) = q.shape, k.shape
    angles = ((1, length, size), (batch, length, size))
    together = batch_k == batch and rest == [length, size] and cos.shape == sin.shape
    return together and size % 2 == 0 and cos.shape in angles


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        out = rotary(q, k, cos, sin)
        ctx.mark_non_differentiable(*(x for x, traced in zip(out, ctx.needs_input_grad, strict=False) if not traced))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = tuple(grad for grad in grads if grad is not None)
        back = iter(Together.apply(_gradients, given, *ctx.saved_tensors) if given else ())  # type: ignore[no-untyped-call]
        return (*(None if grad is None else next(back) for grad in grads), None, None)


def _gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
    *grads, cos, sin = arguments
    return rotary_gradients(grads, cos, sin)
