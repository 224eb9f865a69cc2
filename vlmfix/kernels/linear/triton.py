"""Products of a few rows with weight matrices, which are read once at the speed of the memory.

Programs take a few output features each and hold the rows of x padded to what the tensor cores multiply; with so few
rows the time is that of reading the weights, so layers of one input share a launch and keep the memory busy.
"""

from __future__ import annotations

from functools import cache
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
    operation,
    shared_memory,
)


class Launch(NamedTuple):
    """Launch configuration.

    Args:
        rows: of x, padded.
        block_n: output features of a program.
        block_k: input features that it reads at once.
        warps: of a program.
        stages: of its loop.
    """

    rows: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@cache
def launch(n: int, m: int, gated: bool, index: int | None) -> Launch:
    """The configuration that was found fastest, see benchmarks/NOTES.md.

    Few output features spread over as many multiprocessors as one wave of programs fills, each reading far ahead; many
    do best in small programs.

    Args:
        n: output features of all layers together.
        m: rows of x.
        gated: whether two layers are multiplied.
        index: of the CUDA device.
    """
    processors = multiprocessors(index)
    if INTERPRETED:
        found = Launch(16 if m <= 16 else 32, 32, 64, 1, 1)
    elif m > 16:
        found = Launch(32, 64, 128, 4, 3)
    elif gated:
        found = Launch(16, 32, 128, 2, 3)
    elif n <= 32 * processors:
        found = Launch(16, 32, 256, 4, 5)
    elif n <= 64 * processors:
        found = Launch(16, 64, 128, 4, 5)
    else:
        found = Launch(16, 32, 128, 2, 5)
    stage = 2 * found.block_k * (found.block_n * (1 + gated) + found.rows)
    return found._replace(stages=max(1, min(found.stages, shared_memory(index) // stage)))


@triton.jit
def _product(
    X, Weight, n, N, M, K,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """[BN, MP] float32 products of output features n with all rows."""
    k = tl.arange(0, BK)
    m = tl.arange(0, MP)
    out = tl.zeros([BN, MP], tl.float32)
    start = Weight + n[:, None].to(tl.int64) * K
    for at in range(0, K, BK):
        here = at + k
        weight = tl.load(start + here[None, :], mask=(n < N)[:, None] & (here < K)[None, :], other=0.0)
        x = tl.load(X + m[None, :] * K + here[:, None], mask=(here < K)[:, None] & (m < M)[None, :], other=0.0)
        if CAST:
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        out = tl.dot(weight, x, out)
    return out


@triton.jit(do_not_specialize=["M"])
def _linears(
    X, W0, W1, W2, B0, B1, B2, Out, M, K, N0, N1, N2, BIAS: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """One program: BN output features of one of up to three layers, whose results lie one after the other."""
    program = tl.program_id(0)
    blocks0 = tl.cdiv(N0, BN)
    blocks1 = tl.cdiv(N1, BN)
    if program < blocks0:
        block, weight, bias, features, first = program, W0, B0, N0, 0
    elif program < blocks0 + blocks1:
        block, weight, bias, features, first = program - blocks0, W1, B1, N1, N0
    else:
        block, weight, bias, features, first = program - blocks0 - blocks1, W2, B2, N2, N0 + N1
    n = block * BN + tl.arange(0, BN)
    m = tl.arange(0, MP)
    out = _product(X, weight, n, features, M, K, MP, BN, BK, CAST)
    if BIAS:
        out += tl.load(bias + n, mask=n < features, other=0.0).to(tl.float32)[:, None]
    inside = (n < features)[:, None] & (m < M)[None, :]
    tl.store(Out + M * first + m[None, :] * features + n[:, None], out.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _gated(
    X, Gate, Up, Out, M, K, N, KEEP: tl.constexpr,
    MP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CAST: tl.constexpr,
):  # fmt: skip
    """One program: BN features of silu(x gate^T) * (x up^T), rounded where separate operations round.

    KEEP: both products follow the result in memory.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m = tl.arange(0, MP)
    gate = tl.zeros([BN, MP], tl.float32)
    up = tl.zeros([BN, MP], tl.float32)
    row = n[:, None].to(tl.int64) * K
    for at in range(0, K, BK):
        here = at + k
        inside = (n < N)[:, None] & (here < K)[None, :]
        x = tl.load(X + m[None, :] * K + here[:, None], mask=(here < K)[:, None] & (m < M)[None, :], other=0.0)
        g = tl.load(Gate + row + here[None, :], mask=inside, other=0.0)
        u = tl.load(Up + row + here[None, :], mask=inside, other=0.0)
        if CAST:
            x = x.to(tl.float32)
            g = g.to(tl.float32)
            u = u.to(tl.float32)
        gate = tl.dot(g, x, gate)
        up = tl.dot(u, x, up)
    kind = Out.dtype.element_ty
    gate = gate.to(kind).to(tl.float32)
    up = up.to(kind).to(tl.float32)
    out = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up
    to = Out + m[None, :] * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    tl.store(to, out.to(kind), mask=inside)
    if KEEP:
        tl.store(to + M * N, gate.to(kind), mask=inside)
        tl.store(to + 2 * M * N, up.to(kind), mask=inside)


def _settings(config: Launch, dtype: torch.dtype) -> dict[str, int]:
    return {
        "MP": config.rows,
        "BN": config.block_n,
        "BK": config.block_k,
        "CAST": must_cast(dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


@operation("linears")
def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Results of up to three layers one after the other, [M, N_i] each.

    Args:
        x: [M, D] contiguous, of few rows and 2 bytes an element.
        weights: [N_i, D] each, contiguous and of x's dtype.
        biases: [N_i] each, or an empty list for none.

    Returns:
        [M * sum of N_i].
    """
    m, k = x.shape
    sizes = [len(weight) for weight in weights]
    out = x.new_empty(m * sum(sizes))
    chosen = launch(sum(sizes), m, False, x.device.index)
    missing = 3 - len(weights)
    launches["linears"] += 1
    _linears[(sum(ceil_div(size, chosen.block_n) for size in sizes),)](
        x, *weights, *[weights[0]] * missing, *(biases or [x] * 3), *([biases[0]] * missing if biases else ()),
        out, m, k, *sizes, *[0] * missing, BIAS=bool(biases), **_settings(chosen, x.dtype),
    )  # fmt: skip
    return out


@linears.register_fake  # type: ignore[untyped-decorator]
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return x.new_empty(len(x) * sum(len(weight) for weight in weights))


@operation("gated_linear")
def gated_linear(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.gated_linear`.

    Args:
        x: [M, D] contiguous, of few rows and 2 bytes an element.
        gate: [N, D] contiguous and of x's dtype.
        up: [N, D] likewise.

    Returns:
        [M, N].
    """
    return _gated_linear(x, gate, up, keep=False)[0]


def gated_linear_kept(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As `gated_linear`: [3, M, N], the result, x gate^T and x up^T."""
    return _gated_linear(x, gate, up, keep=True)


def _gated_linear(x: Tensor, gate: Tensor, up: Tensor, keep: bool) -> Tensor:
    (m, k), n = x.shape, len(gate)
    out = x.new_empty(3 if keep else 1, m, n)
    chosen = launch(n, m, True, x.device.index)
    launches["gated_linear"] += 1
    _gated[(ceil_div(n, chosen.block_n),)](x, gate, up, out, m, k, n, KEEP=keep, **_settings(chosen, x.dtype))
    return out


@gated_linear.register_fake  # type: ignore[untyped-decorator]
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(len(x), len(gate))
