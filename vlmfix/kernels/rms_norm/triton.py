"""Root-mean-square normalisation in one launch, one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import launches, power_of_two


@triton.jit
def _norm(X, Weight, Out, eps, D: tl.constexpr, BD: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    x = tl.load(X + row * D + d, mask=d < D, other=0.0)
    weight = tl.load(Weight + d, mask=d < D, other=0.0)
    wide = x.to(tl.float32)
    y = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)).to(x.dtype)
    tl.store(Out + row * D + d, (y.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=d < D)


@triton.jit
def _gradient(Grad, X, Weight, Out, eps, rows, D: tl.constexpr, BD: tl.constexpr):
    """One program: one row of one candidate."""
    at = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    grad = tl.load(Grad + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(X + at % rows * D + d, mask=d < D, other=0.0).to(tl.float32)
    g = grad * tl.load(Weight + d, mask=d < D, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    n = x * factor
    out = factor * (g - n * (tl.sum(g * n, 0) / D))
    tl.store(Out + at * D + d, out.to(Out.dtype.element_ty), mask=d < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; x contiguous, weight of its dtype."""
    size = x.shape[-1]
    out = torch.empty_like(x)
    wide = power_of_two(size, 16)
    launches["rms_norm"] += 1
    _norm[(x.numel() // size,)](x, weight, out, eps, D=size, BD=wide, num_warps=max(1, min(8, wide // 256)))
    return out


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm_gradient`; all contiguous and of one dtype."""
    size = x.shape[-1]
    out = torch.empty_like(grad)
    wide = power_of_two(size, 16)
    programs, warps = grad.numel() // size, max(1, min(8, wide // 256))
    launches["rms_norm_gradient"] += 1
    _gradient[(programs,)](grad, x, weight, out, eps, x.numel() // size, D=size, BD=wide, num_warps=warps)
    return out
