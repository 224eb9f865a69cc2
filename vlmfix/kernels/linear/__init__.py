"""Products of a few rows with weight matrices: check, choose, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.gradients import Together
from vlmfix.kernels.linear import reference
from vlmfix.kernels.silu_mul import silu_mul, silu_mul_gradient

ROWS = 32
"""Most rows of x that the kernels take; more are the vendor's library's business."""

ALONE = 16
"""The same for a single layer."""

TOGETHER = 3
"""Most layers in one launch."""


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Several linear layers of one input, up to `TOGETHER` in one launch; as in `reference.linears`.

    Gradients reach x alone; weights and biases count as constants.

    Raises:
        ValueError: shapes that do not fit together.
    """
    for weight, bias in zip(weights, biases, strict=True):
        _check(x, weight)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    weights = [weight.detach() for weight in weights]
    biases = [None if bias is None else bias.detach() for bias in biases]
    if _traced(x):
        parts: tuple[Tensor, ...] = _Linears.apply(x, biases, *weights)  # type: ignore[no-untyped-call]
        return parts
    given = [bias for bias in biases if bias is not None]
    whole = len(weights) <= TOGETHER and len(given) in (0, len(weights)) and (len(weights) > 1 or _count(x) <= ALONE)
    if not whole or not _served(x, *weights, *given):
        return reference.linears(x, weights, biases)
    from vlmfix.kernels.linear import triton

    rows = _rows(x)
    parts = triton.linears(rows, weights, given).split([len(rows) * len(weight) for weight in weights])
    return tuple(part.view(*x.shape[:-1], len(weight)) for part, weight in zip(parts, weights, strict=True))


def linears_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Gradient of x; arguments and result as in `reference.linears_gradient`."""
    shape, rows = grads[0].shape[:-1], [_rows(grad) for grad in grads]
    if len(rows) <= TOGETHER and _served(grads[0], *rows, *weights):
        from vlmfix.kernels.linear import triton_gradient

        return triton_gradient.linears_gradient(rows, weights).view(*shape, -1)
    out = torch.mm(rows[0], weights[0])
    for grad, weight in zip(rows[1:], weights[1:], strict=True):
        out.addmm_(grad, weight)
    return out.view(*shape, -1)


def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The inner part of a gated layer; arguments and result as in `reference.gated_linear`.

    Gradients reach x alone; gate and up count as constants.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, gate)
    if up.shape != gate.shape:
        raise ValueError(f"up {tuple(up.shape)}: expected {tuple(gate.shape)}")
    gate, up = gate.detach(), up.detach()
    if _traced(x):
        traced: Tensor = _Gated.apply(x, gate, up)  # type: ignore[no-untyped-call]
        return traced
    if not _served(x, gate, up):
        return reference.gated_linear(x, gate, up)
    from vlmfix.kernels.linear import triton

    out: Tensor = triton.gated_linear(_rows(x), gate, up).view(*x.shape[:-1], -1)
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, biases: list[Tensor | None], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        return linears(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        given = [(grad, weight) for grad, weight in zip(grads, ctx.saved_tensors, strict=True) if grad is not None]
        if not given:
            return None, None, *[None] * len(grads)
        out = Together.apply(_gradients, *zip(*given, strict=True))  # type: ignore[no-untyped-call]
        return out[0], None, *[None] * len(grads)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        if _served(x, gate, up):
            from vlmfix.kernels.linear import triton

            out, opened, product = triton.gated_linear_kept(_rows(x), gate, up).view(3, *x.shape[:-1], -1).unbind()
        else:
            opened, product = reference.linears(x, [gate, up], [None, None])
            out = silu_mul(opened, product)
        ctx.save_for_backward(opened, product, gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        out = Together.apply(_gated_gradients, (grad,), *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return out[0], None, None


def _gradients(*arguments: Any) -> tuple[Tensor]:
    *grads, weights = arguments
    return (linears_gradient(grads, weights),)


def _gated_gradients(grad: Tensor, opened: Tensor, product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (linears_gradient(silu_mul_gradient(grad, opened, product), (gate, up)),)


def _traced(x: Tensor) -> bool:
    """Whether gradients run through x; a compiler takes them from the definition."""
    return x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight {tuple(weight.shape)}: expected (N, {x.shape[-1]})")


def _served(x: Tensor, *constants: Tensor) -> bool:
    if x.element_size() != 2:  # sums of float32 products in the order of the kernels are less exact than the vendor's
        return False
    alike = all(y.dtype == x.dtype and y.is_contiguous() for y in constants)
    return 0 < _count(x) <= ROWS and alike and use_triton(x, *constants)


def _count(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
