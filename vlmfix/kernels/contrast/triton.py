"""Contrast and choice: three short kernels over blocks of the vocabulary, so that one row keeps the whole GPU busy.

`_measure` reduces each block of the logits, `_score` writes the scores and each block's largest score and mass, and
`_choose`, one program per row, visits only blocks that can still hold the answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, launches, power_of_two

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
def _score(
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


@triton.jit
def ordered(x):
    """Integers in the order of the floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def following(block, peak, low, NB: tl.constexpr):
    """Next block whose largest score is not below `low`; NB if none is left."""
    i = tl.arange(0, NB)
    return tl.min(tl.where((i > block) & (peak >= low), i, NB), 0)


@triton.jit
def block_masses(S, peak, n, top, inverse, low, BV: tl.constexpr, NB: tl.constexpr):
    """Mass [NB] of each block's scores that are not below `low`."""
    masses = tl.zeros([NB], tl.float32)
    block = following(-1, peak, low, NB)
    while block < NB:
        j = block * BV + tl.arange(0, BV)
        s = tl.load(S + j, mask=j < n, other=NEVER)
        mass = tl.sum(tl.where(ordered(s) >= low, tl.exp2((s - top) * inverse), 0.0), 0)
        masses = tl.where(tl.arange(0, NB) == block, mass, masses)
        block = following(block, peak, low, NB)
    return masses


@triton.jit
def threshold(S, peak, n, top, inverse, floor, target, COUNT: tl.constexpr, BV: tl.constexpr, NB: tl.constexpr):
    """Largest score, as an ordered integer, such that the scores from it on (and from `floor` on) reach `target`.

    COUNT: their number, else their mass.
    """
    low = tl.min(tl.full([16], -2147483648, tl.int32), 0)
    digit = tl.arange(0, 16)
    for step in range(8):
        marks = low + (digit << (28 - 4 * step))
        reach = tl.zeros([16], tl.float32)
        visit = tl.maximum(low, floor)
        block = following(-1, peak, visit, NB)
        while block < NB:
            j = block * BV + tl.arange(0, BV)
            s = tl.load(S + j, mask=j < n, other=NEVER)
            key = ordered(s)
            p = tl.where(s > NEVER, 1.0, 0.0) if COUNT else tl.exp2((s - top) * inverse)
            p = tl.where(key >= visit, p, 0.0)
            reach += tl.sum(tl.where(key[:, None] >= marks[None, :], p[:, None], 0.0), 0)
            block = following(block, peak, visit, NB)
        best = tl.max(tl.where(reach >= target, digit, 0), 0)
        low = tl.max(tl.where(digit == best, marks, -2147483648), 0)
    return tl.maximum(low, floor)


@triton.jit
def _choose(
    S, Peak, Mass, Temperature, TopK, TopP, U, Token, n, blocks, s_b, DRAW: tl.constexpr, TEMPERATURE: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, BV: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One row: its best token, or a draw by inverse CDF from what temperature, top-k and top-p leave."""
    b = tl.program_id(0).to(tl.int64)
    S += b * s_b
    i = tl.arange(0, NB)
    height = tl.load(Peak + b * blocks + i, mask=i < blocks, other=NEVER)
    top = tl.max(height, 0)
    if not DRAW:
        block = tl.min(tl.where(height == top, i, NB), 0)
        j = block * BV + tl.arange(0, BV)
        s = tl.load(S + j, mask=j < n, other=NEVER)
        tl.store(Token + b, tl.min(tl.where((s == top) & (j < n), j, n - 1), 0).to(tl.int64))
    else:
        inverse = LOG2E
        if TEMPERATURE:
            inverse = LOG2E / tl.load(Temperature + b).to(tl.float32)
        top = tl.where(top == NEVER, 0.0, top)
        peak = ordered(height)
        floor = tl.min(ordered(tl.full([16], NEVER, tl.float32)), 0) + 1
        if TOP_K:
            k = tl.load(TopK + b).to(tl.float32)
            k = tl.where(k > 0, k, n.to(tl.float32))
            floor = threshold(S, peak, n, top, inverse, floor, k, True, BV, NB)
        if TOP_P:
            masses = block_masses(S, peak, n, top, inverse, floor, BV, NB)
            p = tl.load(TopP + b).to(tl.float32) * tl.sum(masses, 0)
            floor = threshold(S, peak, n, top, inverse, floor, p, False, BV, NB)
        if TOP_K or TOP_P:
            masses = block_masses(S, peak, n, top, inverse, floor, BV, NB)
        else:
            masses = tl.load(Mass + b * blocks + i, mask=i < blocks, other=0.0) * tl.exp2((height - top) * inverse)
        goal = tl.load(U + b).to(tl.float32) * tl.sum(masses, 0)
        last = tl.max(tl.where(masses > 0, i, 0), 0)
        block = tl.minimum(tl.min(tl.where(tl.cumsum(masses, 0) > goal, i, NB), 0), last)
        j = block * BV + tl.arange(0, BV)
        s = tl.load(S + j, mask=j < n, other=NEVER)
        p = tl.where(ordered(s) >= floor, tl.exp2((s - top) * inverse), 0.0)
        reached = tl.sum(tl.where(i < block, masses, 0.0), 0) + tl.cumsum(p, 0)
        hit = tl.min(tl.where((reached > goal) & (p > 0), j, n), 0)
        tl.store(Token + b, tl.where(hit < n, hit, tl.max(tl.where(p > 0, j, 0), 0)).to(tl.int64))


@torch.library.custom_op("vlmfix::contrast", mutates_args=())
def contrast(
    x: Tensor, y: Tensor, weight: Tensor, base: Tensor | None, beta: Tensor | None, gate: Tensor | None,
    entropy_floor: float, temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.contrast` without normalising (entropy_floor 0: none), then peak and mass of each block of scores."""
    branches, batch, n = y.shape
    blocks = triton.cdiv(n, BLOCK)
    scores, peak, mass = _results(x)
    stat_x = stat_y = None
    if beta is not None or gate is not None:
        stat_x = x.new_empty(1, batch, blocks, 3, dtype=torch.float32)
        _measure[(blocks, batch, 1)](x, stat_x, n, blocks, 0, x.stride(0), BV=BLOCK, num_warps=8)
    if entropy_floor > 0:
        stat_y = x.new_empty(branches, batch, blocks, 3, dtype=torch.float32)
        _measure[(blocks, batch, branches)](y, stat_y, n, blocks, y.stride(0), y.stride(1), BV=BLOCK, num_warps=8)
    launches["contrast"] += 1
    _score[(blocks, batch)](
        x, y, stat_x, stat_y, weight.contiguous(), base, beta, gate, temperature, scores, peak, mass, n, blocks,
        entropy_floor, x.stride(0), y.stride(0), y.stride(1), BRANCHES=branches, BASE=base is not None,
        BETA=beta is not None, GATE=gate is not None, ENTROPY=entropy_floor > 0, TEMPERATURE=temperature is not None,
        WRITE=True, BV=BLOCK, NB=power_of_two(blocks), num_warps=8,
    )  # fmt: skip
    return scores, peak, mass


@contrast.register_fake
def _(x, y, weight, base, beta, gate, entropy_floor, temperature):
    return _results(x)


@torch.library.custom_op("vlmfix::choose", mutates_args=())
def choose(
    scores: Tensor, peak: Tensor | None, mass: Tensor | None, temperature: Tensor | None, top_k: Tensor | None,
    top_p: Tensor | None, u: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens [B] as in `reference.choose`; peak and mass as `contrast` returns them, with the same temperature."""
    batch, n = scores.shape
    blocks = triton.cdiv(n, BLOCK)
    token = torch.empty(batch, device=scores.device, dtype=torch.int64)
    if peak is None or mass is None:
        _, peak, mass = _results(scores)
        _score[(blocks, batch)](
            scores, scores, None, None, None, None, None, None, temperature, None, peak, mass, n, blocks, 0.0,
            scores.stride(0), 0, 0, BRANCHES=0, BASE=False, BETA=False, GATE=False, ENTROPY=False,
            TEMPERATURE=temperature is not None, WRITE=False, BV=BLOCK, NB=power_of_two(blocks), num_warps=8,
        )  # fmt: skip
    launches["choose"] += 1
    _choose[(batch,)](
        scores, peak, mass, temperature, top_k, top_p, u, token, n, blocks, scores.stride(0), DRAW=u is not None,
        TEMPERATURE=temperature is not None, TOP_K=top_k is not None, TOP_P=top_p is not None, BV=BLOCK,
        NB=power_of_two(blocks), num_warps=16,
    )  # fmt: skip
    return token


@choose.register_fake
def _(scores, peak, mass, temperature, top_k, top_p, u):
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = x.shape
    blocks = -(-n // BLOCK)
    scores = torch.empty(batch, n, device=x.device, dtype=torch.float32)
    peak = torch.empty(batch, blocks, device=x.device, dtype=torch.float32)
    return scores, peak, torch.empty_like(peak)
