"""Contrast: two short kernels over blocks of the vocabulary, so that one row keeps the whole GPU busy.

`_measure` reduces each block of the logits, `score` writes the scores and each block's largest score and mass, from
which triton_choose.py picks a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, ceil_div, launches, operation, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(float("-inf"))
BLOCK = 64 if INTERPRETED else 2048


@triton.jit
def _measure(X, Stat, n, blocks, x_n, x_b, BV: tl.constexpr):
    """Per block of each row: maximum, sum of exp(x - maximum), and the sum weighted by x."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BV + tl.arange(0, BV)
    x = tl.load(X + i * x_n + b * x_b + j, mask=j < n, other=NEVER).to(tl.float32)
    top = tl.max(x, 0)
    e = tl.exp2((x - tl.where(top == NEVER, 0.0, top)) * LOG2E)
    at = Stat + ((i * tl.num_programs(1) + b) * blocks + tl.program_id(0)) * 3
    tl.store(at, top)
    tl.store(at + 1, tl.sum(e, 0))
    tl.store(at + 2, tl.sum(tl.where(x == NEVER, 0.0, x * e), 0))


@triton.jit
def summary(Stat, blocks, NB: tl.constexpr):
    """Maximum, sum of exp(x - maximum) and entropy in nats of a row from its blocks."""
    i = tl.arange(0, NB)
    peak = tl.load(Stat + i * 3, mask=i < blocks, other=NEVER)
    top = tl.max(peak, 0)
    scale = tl.exp2((peak - tl.where(top == NEVER, 0.0, top)) * LOG2E)
    total = tl.sum(scale * tl.load(Stat + i * 3 + 1, mask=i < blocks, other=0.0), 0)
    first = tl.sum(scale * tl.load(Stat + i * 3 + 2, mask=i < blocks, other=0.0), 0)
    return top, total, top + tl.log(total) - first / total


@triton.jit
def score(
    X, Y, StatX, StatY, Weight, Base, Beta, Gate, Temperature, S, Peak, Mass, n, blocks, entropy_floor, x_b, y_n, y_b,
    BRANCHES: tl.constexpr, BASE: tl.constexpr, BETA: tl.constexpr, GATE: tl.constexpr, ENTROPY: tl.constexpr,
    TEMPERATURE: tl.constexpr, WRITE: tl.constexpr, BV: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One block of one row: scores, their maximum and the sum of exp((s - maximum) / temperature)."""
    b = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BV + tl.arange(0, BV)
    x = tl.load(X + b * x_b + j, mask=j < n, other=NEVER).to(tl.float32)
    s = x
    if BASE:
        s = x * tl.load(Base + b).to(tl.float32)
    for i in tl.static_range(BRANCHES):
        w = tl.load(Weight + b * BRANCHES + i).to(tl.float32)
        if ENTROPY:
            _, _, nats = summary(StatY + (i * tl.num_programs(1) + b) * blocks * 3, blocks, NB)
            w = w / tl.maximum(nats, entropy_floor)
        y = tl.load(Y + i * y_n + b * y_b + j, mask=j < n, other=NEVER).to(tl.float32)
        y = tl.where(y == NEVER, x, y)
        if BASE:
            s -= w * y
        else:
            s += w * (x - y)
    if BETA or GATE:
        top, total, _ = summary(StatX + b * blocks * 3, blocks, NB)
        if GATE:
            s = tl.where(1.0 / total >= tl.load(Gate + b).to(tl.float32), x, s)
        if BETA:
            s = tl.where(x < top + tl.log(tl.load(Beta + b).to(tl.float32)), NEVER, s)
    s = tl.where(x == NEVER, NEVER, s)
    if WRITE:
        tl.store(S + b * n + j, s, mask=j < n)
    peak = tl.max(s, 0)
    inverse = LOG2E
    if TEMPERATURE:
        inverse = LOG2E / tl.load(Temperature + b).to(tl.float32)
    tl.store(Peak + b * blocks + tl.program_id(0), peak)
    e = tl.exp2((s - tl.where(peak == NEVER, 0.0, peak)) * inverse)
    tl.store(Mass + b * blocks + tl.program_id(0), tl.sum(e, 0))


@operation("contrast")
def contrast(
    x: Tensor, y: Tensor, weight: Tensor, base: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    entropy_floor: float, temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.contrast` without normalising (entropy_floor 0: none), then peak and mass of each block of scores."""
    branches, batch, n = y.shape
    blocks = ceil_div(n, BLOCK)
    scores, peak, mass = block_results(x)
    stat_x = stat_y = None
    if beta is not None or gate is not None:
        stat_x = x.new_empty(1, batch, blocks, 3, dtype=torch.float32)
        _measure[(blocks, batch, 1)](x, stat_x, n, blocks, 0, x.stride(0), BV=BLOCK, num_warps=8)
    if entropy_floor > 0:
        stat_y = x.new_empty(branches, batch, blocks, 3, dtype=torch.float32)
        _measure[(blocks, batch, branches)](y, stat_y, n, blocks, y.stride(0), y.stride(1), BV=BLOCK, num_warps=8)
    launches["contrast"] += 1
    score[(blocks, batch)](
        x, y, stat_x, stat_y, weight.contiguous(), base, beta, gate, temperature, scores, peak, mass, n, blocks,
        entropy_floor, x.stride(0), y.stride(0), y.stride(1), BRANCHES=branches, BASE=base is not None,
        BETA=beta is not None, GATE=gate is not None, ENTROPY=entropy_floor > 0, TEMPERATURE=temperature is not None,
        WRITE=True, BV=BLOCK, NB=power_of_two(blocks), num_warps=8,
    )  # fmt: skip
    return scores, peak, mass


@contrast.register_fake
def _(x, y, weight, base, beta, gate, entropy_floor, temperature):
    return block_results(x)


def block_results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for scores [B, V] and the peak and mass [B, blocks] of their blocks."""
    batch, n = x.shape
    blocks = -(-n // BLOCK)
    scores = torch.empty(batch, n, device=x.device, dtype=torch.float32)
    peak = torch.empty(batch, blocks, device=x.device, dtype=torch.float32)
    return scores, peak, torch.empty_like(peak)
