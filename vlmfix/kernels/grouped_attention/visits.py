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
    padded = _tiled(groups, step)[:, None]
    of_group = padded == torch.arange(n_groups, device=groups.device)[None, :, None, None]
    some = of_group.any(-1)
    return _lists((of_group | (padded == 255)).all(-1) & some, some)


def owners(groups: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `visits` with all groups together (G = 1): the tiles of one group each, then the mixed ones.

    Returns:
        order, ranks and the group [B, T] uint8 that a tile of one group belongs to.
    """
    padded = _tiled(groups, step)
    owner = padded[..., 0].contiguous()
    whole = ((padded == owner[..., None]) | (padded == 255)).all(-1)[:, None]
    return *_lists(whole, torch.ones_like(whole)), owner


def _tiled(groups: Tensor, step: int) -> Tensor:
    """[B, T, step], 255 past the end."""
    tiles = -(-groups.shape[1] // step)
    padded: Tensor = torch.nn.functional.pad(groups, (0, tiles * step - groups.shape[1]), value=255)
    return padded.view(groups.shape[0], tiles, step)


def _lists(whole: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    ranks = torch.stack((whole, some & ~whole), 2).cumsum(-1, dtype=torch.int32)
    ranks = torch.nn.functional.pad(ranks, (1, 0))
    place = torch.where(whole, ranks[:, :, 0, :-1], ranks[:, :, 0, -1:] + ranks[:, :, 1, :-1])
    batch, groups, tiles = whole.shape
    order = torch.zeros(batch, groups, tiles + 1, dtype=torch.int32, device=whole.device)
    index = torch.arange(tiles, dtype=torch.int32, device=whole.device).expand(batch, groups, tiles)
    order.scatter_(2, torch.where(some, place, tiles).long(), index)
    return order[..., :tiles].contiguous(), ranks.contiguous()


def all_visits(batch: int, keys: int, n_groups: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists in which every group meets every tile under a mask, for a group that moves with the query."""
    tiles = torch.arange(-(-keys // step) + 1, dtype=torch.int32, device=device)
    order = tiles[:-1].expand(batch, n_groups, -1)
    return order.contiguous(), torch.stack((tiles * 0, tiles)).expand(batch, n_groups, 2, -1).contiguous()
