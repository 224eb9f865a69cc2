"""The product of a gated layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches

BLOCK = 1024


@triton.jit
def _product(Gate, Up, Out, n, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(Gate + at, mask=at < n, other=0.0)
    up = tl.load(Up + at, mask=at < n, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(Out + at, (opened.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=at < n)


@triton.jit
def _gradient(Grad, Gate, Up, OutGate, OutUp, n, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring numbers of one candidate."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.program_id(1).to(tl.int64) * n + at
    gate = tl.load(Gate + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(Up + at, mask=at < n, other=0.0).to(tl.float32)
    grad = tl.load(Grad + here, mask=at < n, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    kind = OutGate.dtype.element_ty
    tl.store(OutGate + here, (grad * up * (s * (1 + gate * (1 - s)))).to(kind), mask=at < n)
    tl.store(OutUp + here, (grad * (gate * s)).to(kind), mask=at < n)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.silu_mul`; both contiguous and of one dtype."""
    out = torch.empty_like(gate)
    launches["silu_mul"] += 1
    _product[(ceil_div(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=4)
    return out


def silu_mul_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.silu_mul_gradient`; all contiguous and of one dtype."""
    out, n = (torch.empty_like(grad), torch.empty_like(grad)), gate.numel()
    launches["silu_mul_gradient"] += 1
    _gradient[(ceil_div(n, BLOCK), len(grad))](grad, gate, up, *out, n, BLOCK=BLOCK, num_warps=4)
    return out
