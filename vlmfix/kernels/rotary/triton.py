"""Rotary position embedding in one launch for queries and keys, one program per token and few heads."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches, power_of_two, rows_contiguous

HEADS = 4
"""Heads of one program: two loads of 16 bytes per thread of one warp at 128 numbers of two bytes."""


@triton.jit
def _turn(X, Out, first, n, x_h, out_h, cos1, cos2, sin1, sin2, HALF: tl.constexpr, BH: tl.constexpr, T: tl.constexpr):
    """T heads of one token from the `first` of n, each product and the sum rounded."""
    head = (first + tl.arange(0, T))[:, None]
    d = tl.arange(0, BH)[None, :]
    there = (head < n) & (d < HALF)
    dtype = X.dtype.element_ty
    x1 = tl.load(X + head * x_h + d, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(X + head * x_h + HALF + d, mask=there, other=0.0).to(tl.float32)
    y1 = (x1 * cos1).to(dtype).to(tl.float32) - (x2 * sin1).to(dtype).to(tl.float32)
    y2 = (x2 * cos2).to(dtype).to(tl.float32) + (x1 * sin2).to(dtype).to(tl.float32)
    tl.store(Out + head * out_h + d, y1.to(dtype), mask=there)
    tl.store(Out + head * out_h + HALF + d, y2.to(dtype), mask=there)


@triton.jit
def _rotate(
    Q, K, Cos, Sin, OutQ, OutK, n_q, n_k, length, n_cos, q_b, q_h, q_n, k_b, k_h, k_n,
    BACK: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program: T heads of one token, first those of the queries, then those of the keys."""
    tiles_q = tl.cdiv(n_q, T)
    tiles = tiles_q + tl.cdiv(n_k, T)
    at = tl.program_id(0)  # divided in 32 bits, multiplied by strides in 64
    token = at // tiles
    tile = (at % tiles).to(tl.int64)
    n = (token % length).to(tl.int64)
    b = (token // length).to(tl.int64)
    d = tl.broadcast_to(tl.arange(0, BH)[None, :], (T, BH))  # laid out as the heads are: no exchange between threads
    angle = (b % n_cos * length + n) * 2 * HALF + d
    cos1 = tl.load(Cos + angle, mask=d < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(Cos + angle + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(Sin + angle, mask=d < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(Sin + angle + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    if BACK:  # the transpose of [[cos1, -sin1], [sin2, cos2]]
        turned = sin1
        sin1 = -sin2
        sin2 = -turned
    out_h = length * 2 * HALF
    if tile < tiles_q:
        X = Q + b * q_b + n * q_n
        Out = OutQ + (b * n_q * length + n) * 2 * HALF
        _turn(X, Out, tile * T, n_q, q_h, out_h, cos1, cos2, sin1, sin2, HALF, BH, T)
    else:
        X = K + b * k_b + n * k_n
        Out = OutK + (b * n_k * length + n) * 2 * HALF
        _turn(X, Out, (tile - tiles_q) * T, n_k, k_h, out_h, cos1, cos2, sin1, sin2, HALF, BH, T)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.rotary`; all of one dtype, last dimensions contiguous; the results are contiguous."""
    launches["rotary"] += 1
    return _launch(q, k, cos, sin, back=False)


def rotary_gradients(grads: Sequence[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As `reference.rotary_gradient`, one or two at once; all of one dtype; the results are contiguous."""
    # candidates as further rows: views unless several rows are transposed
    rows = [rows_contiguous(grad.flatten(0, 1)) for grad in grads]
    launches["rotary_gradient"] += 1
    out = _launch(rows[0], rows[1] if len(rows) > 1 else rows[0][:, :0], cos, sin, back=True)
    return tuple(x.view(grad.shape) for x, grad in zip(out, grads, strict=False))


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Turns both; cos and sin repeat along the batch."""
    batch, n_q, length, size = q.shape
    n_k = k.shape[1]
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    wide = power_of_two(size // 2, 8)
    programs = batch * length * (ceil_div(n_q, HEADS) + ceil_div(n_k, HEADS))
    _rotate[(programs,)](
        q, k, cos, sin, out_q, out_k, n_q, n_k, length, cos.shape[0], *q.stride()[:3], *k.stride()[:3],
        BACK=back, HALF=size // 2, BH=wide, T=HEADS, num_warps=max(1, HEADS * wide // 256),
        enable_fp_fusion=False,  # a fused multiply-add would leave out a rounding
    )  # fmt: skip
    return out_q, out_k
