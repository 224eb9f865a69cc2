"""Which key tiles hold keys of which group: the work lists of the tile kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, power_of_two


@triton.jit
def _visits(
    Groups, KPos, Order, Ranks, Counter, n_k, n_table, n_tiles, G: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
    CONSECUTIVE: tl.constexpr,
):  # fmt: skip
    """One program: the lists of one group of one row; group G stands for all groups together."""
    line = tl.program_id(0)
    b = line // (G + 1)
    g = line % (G + 1)
    if line == 0:
        tl.store(Counter, 0)
    ranks = Ranks + line * 2 * (n_tiles + 1)
    more = ranks + n_tiles + 1
    order = Order + line * 2 * n_tiles
    tl.store(ranks, 0)
    tl.store(more, 0)
    base = tl.load(KPos).to(tl.int32)
    wholes = 0
    mixes = 0
    for at in range(0, n_tiles, T):
        t = at + tl.arange(0, T)
        j = t[:, None] * N + tl.arange(0, N)[None, :]
        here = j < n_k
        keys = base + j if CONSECUTIVE else tl.load(KPos + j, mask=here, other=0).to(tl.int32)
        of = tl.load(Groups + b * n_table + keys, mask=here & (keys < n_table), other=0).to(tl.int32)
        least = tl.min(tl.where(here, of, 256), 1)
        most = tl.max(tl.where(here, of, -1), 1)
        some = tl.max(tl.where(here & ((of == g) | (of * 0 + g == G)), 1, 0), 1) > 0
        whole = (least == g) & (most == g)
        mixed = (least < most) & some
        whole_rank = wholes + tl.cumsum(whole.to(tl.int32), 0)
        mixed_rank = mixes + tl.cumsum(mixed.to(tl.int32), 0)
        tl.store(ranks + 1 + t, whole_rank, mask=t < n_tiles)
        tl.store(more + 1 + t, mixed_rank, mask=t < n_tiles)
        tl.store(order + whole_rank - 1, t, mask=whole)
        tl.store(order + n_tiles + mixed_rank - 1, t, mask=mixed)
        wholes += tl.sum(whole.to(tl.int32), 0)
        mixes += tl.sum(mixed.to(tl.int32), 0)


def visits(
    groups: Tensor, k_pos: Tensor, n_groups: int, step: int, consecutive: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tiles per group, by one small kernel.

    Args:
        groups: [B, K0] uint8 group of each prompt slot; later slots are group 0.
        k_pos: [K] slot of each key.
        n_groups: G.
        step: keys per tile; T tiles in all.
        consecutive: k_pos counts up by one.

    Returns:
        order [B, G + 1, 2, T] int32 (flat, one element to spare), the tiles that belong to the group as a whole and
        those that hold it and another, undefined past their number; ranks [B, G + 1, 2, T + 1] int32, how many tiles of
        either sort come before tile t; a counter at zero [1] int32; and T. Line G has no whole tiles, but all mixed.
    """
    batch, keys, device = groups.shape[0], k_pos.shape[0], groups.device
    tiles = ceil_div(keys, step)
    lines = batch * (n_groups + 1)
    order = torch.empty(lines * 2 * tiles + 1, dtype=torch.int32, device=device)
    ranks = torch.empty(lines, 2, tiles + 1, dtype=torch.int32, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    _visits[(lines,)](
        groups, k_pos, order, ranks, counter, keys, groups.shape[1], tiles, G=n_groups, N=step,
        T=min(power_of_two(tiles), 64), CONSECUTIVE=consecutive, num_warps=4,
    )  # fmt: skip
    return order, ranks, counter, tiles
