"""Choice of a token from scores whose blocks are measured: the best, or a seeded draw.

A draw under top-k or top-p first collects the scores near the best, in order of the vocabulary; one program per row
then settles thresholds and draw among these, if they are few and hold all that can be drawn. Else it searches the
thresholds digit by digit, visiting only blocks that can still hold the answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.contrast.triton import BLOCK, LOG2E, NEVER, block_results, score
from vlmfix.kernels.dispatch import INTERPRETED, ceil_div, launches, operation, power_of_two

NEAR = 10.0
"""Scores this many nats (at temperature 1) below the best are collected."""

FEW = 64 if INTERPRETED else 256
"""Most collected scores among which the draw is settled directly."""

KEEP = min(FEW, BLOCK)
"""Most collected scores of one block."""


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
def _collect(
    S, Peak, Temperature, Value, Index, Count, n, blocks, s_b, TEMPERATURE: tl.constexpr, NEAR: tl.constexpr,
    KEEP: tl.constexpr, BV: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """One block of one row: its scores within NEAR nats of the row's best, in order, and how many these are.

    More than KEEP count as too many for anybody. Beside it the number of all finite scores.
    """
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, NB)
    top = tl.max(tl.load(Peak + b * blocks + i, mask=i < blocks, other=NEVER), 0)
    near = top - NEAR * tl.load(Temperature + b).to(tl.float32) if TEMPERATURE else top - NEAR
    j = block * BV + tl.arange(0, BV)
    s = tl.load(S + b * s_b + j, mask=j < n, other=NEVER)
    keep = (s >= near) & (s > NEVER)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    line = b * blocks + block
    tl.store(Value + line * KEEP + place, s, mask=keep & (place < KEEP))
    tl.store(Index + line * KEEP + place, j, mask=keep & (place < KEEP))
    count = tl.sum(keep.to(tl.int32), 0)
    tl.store(Count + line * 2, tl.where(count <= KEEP, count, 1 << 20))
    tl.store(Count + line * 2 + 1, tl.sum((s > NEVER).to(tl.int32), 0))


@triton.jit
def _draw_among_few(
    Value, Index, Count, Flat, Token, found, finite, blocks, top, whole, inverse, TopK, TopP, U, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, KEEP: tl.constexpr, CAP: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Draws among the collected scores of a row, at most CAP; whether they were all that mattered."""
    slot = tl.arange(0, CAP)
    block = tl.zeros([CAP], tl.int32)
    skipped = tl.zeros([CAP], tl.int32)
    base = 0
    STEP: tl.constexpr = min(NB, 16)
    for at in range(0, blocks, STEP):
        i = at + tl.arange(0, STEP)
        count = tl.load(Count + i * 2, mask=i < blocks, other=0)
        passed = (base + tl.cumsum(count, 0))[None, :] <= slot[:, None]
        block += tl.sum(passed.to(tl.int32), 1)
        skipped += tl.sum(tl.where(passed, count[None, :], 0), 1)
        base += tl.sum(count, 0)
    here = slot < found
    at = tl.minimum(block, blocks - 1) * KEEP + slot - skipped
    value = tl.load(Value + at, mask=here, other=NEVER)
    index = tl.load(Index + at, mask=here, other=0)
    p = tl.exp2((value - top) * inverse)
    covered = found == finite
    total = whole
    if TOP_K or TOP_P:
        tl.store(Flat + slot, value, mask=here)
        tl.debug_barrier()
    floor = tl.min(tl.full([16], NEVER, tl.float32), 0)
    if TOP_K:
        k = tl.load(TopK).to(tl.int32)
        above = tl.zeros([CAP], tl.int32)
        for at in range(0, found, 16):
            i = at + tl.arange(0, 16)
            other = tl.load(Flat + i, mask=i < found, other=NEVER)
            above += tl.sum((other[None, :] > value[:, None]).to(tl.int32), 1)
        kept = here & ((above < k) | (k <= 0))
        floor = tl.min(tl.where(kept, value, float("inf")), 0)
        p = tl.where(kept, p, 0.0)
        total = tl.where(k > 0, tl.sum(p, 0), whole)
        covered = covered | ((k > 0) & (found >= k))
    if TOP_P:
        goal = tl.load(TopP).to(tl.float32) * total
        covered = covered | (tl.sum(p, 0) >= goal)
        above_mass = tl.zeros([CAP], tl.float32)
        for at in range(0, found, 16):
            i = at + tl.arange(0, 16)
            other = tl.load(Flat + i, mask=i < found, other=NEVER)
            mass = tl.where(other >= floor, tl.exp2((other - top) * inverse), 0.0)
            above_mass += tl.sum(tl.where(other[None, :] > value[:, None], mass[None, :], 0.0), 1)
        p = tl.where((above_mass < goal) | (value == top), p, 0.0)
    p = tl.where(here, p, 0.0)
    goal = tl.load(U).to(tl.float32) * tl.sum(p, 0)
    hit = tl.min(tl.where((tl.cumsum(p, 0) > goal) & (p > 0), slot, CAP), 0)
    hit = tl.where(hit < CAP, hit, tl.max(tl.where(p > 0, slot, 0), 0))
    tl.store(Token, tl.sum(tl.where(slot == hit, index, 0), 0).to(tl.int64))
    return covered


@triton.jit
def _choose(
    S, Peak, Mass, Temperature, TopK, TopP, U, Value, Index, Count, Flat, Token, n, blocks, s_b, DRAW: tl.constexpr,
    TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, KEEP: tl.constexpr, CAP: tl.constexpr,
    BV: tl.constexpr, NB: tl.constexpr,
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
        masses = tl.load(Mass + b * blocks + i, mask=i < blocks, other=0.0) * tl.exp2((height - top) * inverse)
        done = tl.program_id(0) < 0
        if TOP_K or TOP_P:
            Count += b * blocks * 2
            found = tl.sum(tl.load(Count + i * 2, mask=i < blocks, other=0), 0)
            finite = tl.sum(tl.load(Count + i * 2 + 1, mask=i < blocks, other=0), 0)
            if found <= CAP:
                done = _draw_among_few(
                    Value + b * blocks * KEEP, Index + b * blocks * KEEP, Count, Flat + b * CAP, Token + b, found,
                    finite, blocks, top, tl.sum(masses, 0), inverse, TopK + b if TOP_K else TopK,
                    TopP + b if TOP_P else TopP, U + b, TOP_K, TOP_P, KEEP, CAP, NB,
                )  # fmt: skip
        if not done:
            peak = ordered(height)
            floor = tl.min(ordered(tl.full([16], NEVER, tl.float32)), 0) + 1
            if TOP_K:
                k = tl.load(TopK + b).to(tl.float32)
                k = tl.where(k > 0, k, n.to(tl.float32))
                floor = threshold(S, peak, n, top, inverse, floor, k, True, BV, NB)
            if TOP_P:
                if TOP_K:
                    masses = block_masses(S, peak, n, top, inverse, floor, BV, NB)
                p = tl.load(TopP + b).to(tl.float32) * tl.sum(masses, 0)
                floor = threshold(S, peak, n, top, inverse, floor, p, False, BV, NB)
            if TOP_K or TOP_P:
                masses = block_masses(S, peak, n, top, inverse, floor, BV, NB)
            goal = tl.load(U + b).to(tl.float32) * tl.sum(masses, 0)
            last = tl.max(tl.where(masses > 0, i, 0), 0)
            block = tl.minimum(tl.min(tl.where(tl.cumsum(masses, 0) > goal, i, NB), 0), last)
            j = block * BV + tl.arange(0, BV)
            s = tl.load(S + j, mask=j < n, other=NEVER)
            p = tl.where(ordered(s) >= floor, tl.exp2((s - top) * inverse), 0.0)
            reached = tl.sum(tl.where(i < block, masses, 0.0), 0) + tl.cumsum(p, 0)
            hit = tl.min(tl.where((reached > goal) & (p > 0), j, n), 0)
            tl.store(Token + b, tl.where(hit < n, hit, tl.max(tl.where(p > 0, j, 0), 0)).to(tl.int64))


@operation("choose")
def choose(
    scores: Tensor, peak: Tensor | None, mass: Tensor | None, temperature: Tensor | None, top_k: Tensor | None,
    top_p: Tensor | None, u: Tensor | None,
) -> Tensor:  # fmt: skip
    """Tokens [B] as in `reference.choose`; peak and mass as `contrast` returns them, with the same temperature."""
    batch, n = scores.shape
    blocks = ceil_div(n, BLOCK)
    token = torch.empty(batch, device=scores.device, dtype=torch.int64)
    if peak is None or mass is None:
        _, peak, mass = block_results(scores)
        score[(blocks, batch)](
            scores, scores, None, None, None, None, None, None, temperature, None, peak, mass, n, blocks, 0.0,
            scores.stride(0), 0, 0, BRANCHES=0, BASE=False, BETA=False, GATE=False, ENTROPY=False,
            TEMPERATURE=temperature is not None, WRITE=False, BV=BLOCK, NB=power_of_two(blocks), num_warps=8,
        )  # fmt: skip
    value = index = count = flat = None
    if u is not None and (top_k is not None or top_p is not None):
        value = torch.empty(batch, blocks, KEEP, device=scores.device, dtype=torch.float32)
        index = torch.empty(batch, blocks, KEEP, device=scores.device, dtype=torch.int32)
        count = torch.empty(batch, blocks, 2, device=scores.device, dtype=torch.int32)
        flat = torch.empty(batch, FEW, device=scores.device, dtype=torch.float32)
        _collect[(blocks, batch)](
            scores, peak, temperature, value, index, count, n, blocks, scores.stride(0),
            TEMPERATURE=temperature is not None, NEAR=NEAR, KEEP=KEEP, BV=BLOCK, NB=power_of_two(blocks), num_warps=8,
        )  # fmt: skip
    launches["choose"] += 1
    _choose[(batch,)](
        scores, peak, mass, temperature, top_k, top_p, u, value, index, count, flat, token, n, blocks,
        scores.stride(0), DRAW=u is not None, KEEP=KEEP, CAP=FEW,
        TEMPERATURE=temperature is not None, TOP_K=top_k is not None, TOP_P=top_p is not None, BV=BLOCK,
        NB=power_of_two(blocks), num_warps=16,
    )  # fmt: skip
    return token


@choose.register_fake
def _(scores, peak, mass, temperature, top_k, top_p, u):
    return scores.new_empty(scores.shape[0], dtype=torch.int64)
