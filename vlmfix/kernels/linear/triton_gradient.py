"""Gradients that a few rows send back through weight matrices, which are read once, in rows as they lie in memory.

Programs take neighbouring input features and a share of the output features of every layer; a second launch adds up
the shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import (
    INTERPRETED,
    ceil_div,
    launches,
    multiprocessors,
    must_cast,
    power_of_two,
    shared_memory,
)


class Launch(NamedTuple):
    """Launch configuration.

    Args:
        rows: of the gradients, padded.
        block_n: output features that a program reads at once.
        block_k: input features of a program.
        shares: into which the output features of each layer are split.
        warps: of a program.
        stages: of its loops.
    """

    rows: int
    block_n: int
    block_k: int
    shares: int
    warps: int
    stages: int


def launch(sizes: Sequence[int], k: int, m: int, index: int | None) -> Launch:
    """The configuration: two programs for each multiprocessor, 256 neighbouring bytes of a weight at a time.

    Args:
        sizes: output features of each layer.
        k: input features.
        m: rows of the gradients.
        index: of the CUDA device.
    """
    rows, block_n, block_k = (16 if m <= 16 else 32), (32 if INTERPRETED else 64), (32 if INTERPRETED else 128)
    shares = ceil_div(2 * multiprocessors(index), ceil_div(k, block_k))
    shares = max(1, min(shares, 32, ceil_div(max(sizes), block_n)))
    stage = 2 * block_n * (block_k + rows)
    return Launch(rows, block_n, block_k, shares, 4, max(1, min(4, shared_memory(index) // stage)))


@triton.jit
def _share(
    Grad, Weight, out, k, share, shares, N, M, K,
    MP: tl.constexpr, BN: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """Adds one layer's part [MP, BK] to the input features k."""
    m = tl.arange(0, MP)
    each = tl.cdiv(tl.cdiv(N, BN), shares) * BN
    for at in range(share * each, tl.minimum(share * each + each, N), BN):
        n = at + tl.arange(0, BN)
        grad = tl.load(Grad + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        start = Weight + n[:, None].to(tl.int64) * K
        weight = tl.load(start + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        if CAST:
            grad = grad.to(tl.float32)
            weight = weight.to(tl.float32)
        out = tl.dot(grad, weight, out)
    return out


@triton.jit(do_not_specialize=["M"])
def _pull(
    G0, G1, G2, W0, W1, W2, Out, M, K, N0, N1, N2, shares, LAYERS: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """One program: BK input features, one share of the output features."""
    share = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    m = tl.arange(0, MP)
    out = tl.zeros([MP, BK], tl.float32)
    out = _share(G0, W0, out, k, share, shares, N0, M, K, MP, BN, CAST)
    if LAYERS > 1:
        out = _share(G1, W1, out, k, share, shares, N1, M, K, MP, BN, CAST)
    if LAYERS > 2:
        out = _share(G2, W2, out, k, share, shares, N2, M, K, MP, BN, CAST)
    to = Out + (share * M + m[:, None]) * K + k[None, :]
    tl.store(to, out.to(Out.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit
def _total(Part, Out, n, shares, SB: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK neighbouring numbers, summed over the shares."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, SB)
    inside = (share < shares)[:, None] & (at < n)[None, :]
    part = tl.load(Part + share[:, None] * n + at[None, :], mask=inside, other=0.0)
    tl.store(Out + at, tl.sum(part, 0).to(Out.dtype.element_ty), mask=at < n)


def linears_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """As `reference.linears_gradient` of up to three layers, all summed before anything is rounded.

    Args:
        grads: [M, N_i] each, contiguous, of few rows and 2 bytes an element.
        weights: [N_i, K] each, contiguous and of the gradients' dtype.

    Returns:
        [M, K].
    """
    (m, _), k, sizes = grads[0].shape, weights[0].shape[1], [len(weight) for weight in weights]
    rows, block_n, block_k, shares, warps, stages = launch(sizes, k, m, grads[0].device.index)
    out = grads[0].new_empty(m, k)
    parts = out if shares == 1 else out.new_empty(shares, m, k, dtype=torch.float32)
    missing = 3 - len(grads)
    launches["linears_gradient"] += 1
    _pull[(ceil_div(k, block_k), shares)](
        *grads, *[grads[0]] * missing, *weights, *[weights[0]] * missing, parts, m, k, *sizes, *[0] * missing, shares,
        LAYERS=len(grads), MP=rows, BN=block_n, BK=block_k, CAST=must_cast(out.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    if shares > 1:
        block = 256
        _total[(ceil_div(m * k, block),)](parts, out, m * k, shares, SB=power_of_two(shares), BLOCK=block, num_warps=4)
    return out
