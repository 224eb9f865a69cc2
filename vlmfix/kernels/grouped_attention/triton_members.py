"""The keys of each group in order: the work lists of the tile kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import power_of_two


@triton.jit
def _members(
    Groups, KPos, Order, Ranks, Counter, n_k, n_table, G: tl.constexpr, N: tl.constexpr, CONSECUTIVE: tl.constexpr
):
    """One program: the list of one group of one row."""
    line = tl.program_id(0)
    b = line // G
    g = line % G
    if line == 0:
        tl.store(Counter, 0)
    ranks = Ranks + line * (n_k + 1)
    order = Order + line * n_k
    tl.store(ranks, 0)
    base = tl.load(KPos).to(tl.int32)
    before = 0
    for at in range(0, n_k, N):
        j = at + tl.arange(0, N)
        here = j < n_k
        keys = base + j if CONSECUTIVE else tl.load(KPos + j, mask=here, other=0).to(tl.int32)
        of = tl.load(Groups + b * n_table + keys, mask=here & (keys < n_table), other=0).to(tl.int32)
        mine = here & (of == g)
        rank = before + tl.cumsum(mine.to(tl.int32), 0)
        tl.store(ranks + 1 + j, rank, mask=here)
        tl.store(order + rank - 1, j, mask=mine)
        before += tl.sum(mine.to(tl.int32), 0)


def members(groups: Tensor, k_pos: Tensor, n_groups: int, consecutive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys by group, by one small kernel.

    Args:
        groups: [B, K0] uint8 group of each prompt slot; later slots are group 0.
        k_pos: [K] slot of each key.
        n_groups: G.
        consecutive: k_pos counts up by one.

    Returns:
        order [B, G, K] int32, the keys of the group in ascending order, undefined past their number; ranks
        [B, G, K + 1] int32, how many keys of the group come before key k; and a counter at zero [1] int32.
    """
    batch, keys, device = groups.shape[0], k_pos.shape[0], groups.device
    order = torch.empty(batch, n_groups, keys, dtype=torch.int32, device=device)
    ranks = torch.empty(batch, n_groups, keys + 1, dtype=torch.int32, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    step = min(power_of_two(keys), 4096)
    _members[(batch * n_groups,)](
        groups, k_pos, order, ranks, counter, keys, groups.shape[1], G=n_groups, N=step, CONSECUTIVE=consecutive,
        num_warps=8 if step > 1024 else 4,
    )  # fmt: skip
    return order, ranks, counter
