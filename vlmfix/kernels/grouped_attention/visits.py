"""Which key tiles hold keys of which group: the work lists of the tile kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def visits(groups: Tensor, n_groups: int, step: int) -> tuple[Tensor, Tensor]:
    """Tiles per group.

    Args:
        groups: [B, K] group of each key.
        n_groups: G.
        step: keys per tile.

    Returns:
        order [B, G, T] int32, the tiles that belong to the group as a whole, then those that hold it and another; ranks
        [B, G, 2, T + 1] int32, how many tiles of either sort come before tile t.
    """
    batch, keys = groups.shape
    tiles = -(-keys // step)
    padded = torch.nn.functional.pad(groups, (0, tiles * step - keys), value=255).view(batch, 1, tiles, step)
    of_group = padded == torch.arange(n_groups, device=groups.device)[None, :, None, None]
    some = of_group.any(-1)
    whole = (of_group | (padded == 255)).all(-1) & some
    ranks = torch.stack((whole, some & ~whole), 2).cumsum(-1, dtype=torch.int32)
    ranks = torch.nn.functional.pad(ranks, (1, 0))
    place = torch.where(whole, ranks[:, :, 0, :-1], ranks[:, :, 0, -1:] + ranks[:, :, 1, :-1])
    order = torch.zeros(batch, n_groups, tiles + 1, dtype=torch.int32, device=groups.device)
    index = torch.arange(tiles, dtype=torch.int32, device=groups.device).expand(batch, n_groups, tiles)
    order.scatter_(2, torch.where(some, place, tiles).long(), index)
    return order[..., :tiles].contiguous(), ranks.contiguous()


def all_visits(batch: int, keys: int, n_groups: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists in which every group meets every tile under a mask, for a group that moves with the query."""
    tiles = torch.arange(-(-keys // step) + 1, dtype=torch.int32, device=device)
    order = tiles[:-1].expand(batch, n_groups, -1)
    return order.contiguous(), torch.stack((tiles * 0, tiles)).expand(batch, n_groups, 2, -1).contiguous()
