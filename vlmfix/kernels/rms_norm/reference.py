"""Root-mean-square normalisation: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """W * (x / sqrt(mean(x^2) + eps)), the quotient in float32 and rounded to x's dtype before the product.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of weight times x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of x for C gradients of the result: r (g - n mean(g n)), r being the factor, n = r x, g = grad * weight.

    Args:
        grad: [C, ..., D].
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [C, ..., D] in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, g = x.to(dtype), grad.to(dtype) * weight.to(dtype)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = wide * factor
    return (factor * (g - n * (g * n).mean(-1, keepdim=True))).to(x.dtype)
