"""Parts of the kernels that write outputs: what each group's part weighs, given all masses and the plans' rule."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmfix.kernels.grouped_attention.triton import LOG2E


@triton.jit
def no_rule(masses, kinds, heads, arguments):
    """Every group as it is."""
    return tl.where(kinds[None, :] >= 0, 1.0, masses)


@triton.jit
def ruled(mass, kinds, heads, arguments, RULE: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RADIX: tl.constexpr,
          SIZE: tl.constexpr, PB: tl.constexpr):  # fmt: skip
    """Factors [HB, RB] on the kinds that a plan's rule asks for, given the masses [HB, RB] of the kinds."""
    slot = tl.arange(0, PB)
    digit = tl.where(kinds < G, kinds // RADIX % SIZE, SIZE)
    hot = tl.where((digit[:, None] == slot[None, :]) & (kinds < R)[:, None], 1.0, 0.0)
    asked = RULE(tl.sum(mass[:, :, None] * hot[None, :, :], 1), slot, heads, arguments)
    return tl.sum(asked[:, None, :] * hot[None, :, :], 2)


@triton.jit
def row_weights(
    peak, amount, factor, kinds, iq, pos, b, h, Sinks, HeadScale, Active, Arguments, rule_plan, n_batch, n_heads,
    G: tl.constexpr, R: tl.constexpr, RULE: tl.constexpr, RULED: tl.constexpr, RADIX: tl.constexpr, SIZE: tl.constexpr,
    PB: tl.constexpr, N_ARGUMENTS: tl.constexpr, SINKS: tl.constexpr, HEAD_SCALE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """For rows [QB] of one head with maxima and sums [QB, RB] of R kinds: the weight of each kind's unnormalised part.

    Also the masses, the largest maximum and the sum below it. `factor` [QB, RB] holds unless the rule says otherwise.
    """
    top = tl.max(peak, 1)
    if SINKS:
        sink = tl.load(Sinks + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(peak - top[:, None])
    mass = share * amount
    total = tl.sum(tl.where((kinds < G)[None, :], mass, 0.0), 1)
    if SINKS:
        total += tl.exp2(sink - top)
    inverse = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    mass *= inverse[:, None]
    if RULED:
        asked = ruled(mass, kinds, iq, Arguments + b * N_ARGUMENTS, RULE, G, R, RADIX, SIZE, PB)
        factor = tl.where((pos >= tl.load(Active + rule_plan * n_batch + b))[:, None], asked, factor)
    scale = inverse
    if HEAD_SCALE:
        for p in tl.static_range(P):
            act = pos >= tl.load(Active + p * n_batch + b)
            scale *= tl.where(act, tl.load(HeadScale + (p * n_batch + b) * n_heads + h), 1.0)
    return share * factor * scale[:, None], mass, top, total
