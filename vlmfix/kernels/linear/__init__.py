"""Products of a few rows with weight matrices: check, choose, call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.linear import reference

ROWS = 32
"""Most rows of x that the kernels take; more are the vendor's library's business."""

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
    given = [bias.detach() for bias in biases if bias is not None]
    whole = len(weights) <= TOGETHER and len(given) in (0, len(weights))
    if not whole or not _served(x, *weights, *given):
        return reference.linears(x, weights, [None if bias is None else bias.detach() for bias in biases])
    from vlmfix.kernels.linear import triton

    out = triton.linears(_rows(x), list(weights), given)
    return tuple(part.unflatten(0, x.shape[:-1]) for part in out.split([len(weight) for weight in weights], -1))


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
    if not _served(x, gate, up):
        return reference.gated_linear(x, gate, up)
    from vlmfix.kernels.linear import triton

    out: Tensor = triton.gated_linear(_rows(x), gate, up).unflatten(0, x.shape[:-1])
    return out


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight {tuple(weight.shape)}: expected (N, {x.shape[-1]})")


def _served(x: Tensor, *constants: Tensor) -> bool:
    if x.element_size() != 2:  # sums of float32 products in the order of the kernels are less exact than the vendor's
        return False
    few = 0 < x.numel() // max(1, x.shape[-1]) <= ROWS
    alike = all(y.dtype == x.dtype and y.is_contiguous() for y in constants)
    return few and alike and use_triton(x, *constants)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
