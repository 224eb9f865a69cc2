"""Root-mean-square normalisation: check, choose, call."""

from __future__ import annotations

from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension; arguments and result as in `reference.rms_norm`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)}: expected ({x.shape[-1]},)")
    if not use_triton(x, weight) or weight.dtype != x.dtype or x.requires_grad:
        return reference.rms_norm(x, weight, eps)
    from vlmfix.kernels.rms_norm import triton

    return triton.rms_norm(x.contiguous(), weight.contiguous(), eps)
