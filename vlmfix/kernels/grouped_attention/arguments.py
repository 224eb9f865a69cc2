"""What the split and the tile kernel have in common on their way from tensors to a launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import must_cast, power_of_two, precision


def common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    q_pos: Tensor,
    k_pos: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    groups: Tensor | None,
    active: Tensor,
    tables: Tensor | None,
    key_slope: Tensor | None,
    key_weight: Tensor | None,
    hidden: Tensor | None,
    roll_start: Tensor | None,
    scale: float,
    softcap: float,
    n_groups: int,
    rolling: list[int],
    causal: bool,
    consecutive: bool,
) -> tuple[list[Any], dict[str, Any]]:
    """Leading positional arguments (pointers, numbers, strides) and constants of both kernels.

    Args:
        q: [B, H, Q, D], last dimension contiguous, as in k and v.
        k: [B, Hkv, K, D].
        v: [B, Hkv, K, Dv].
        mask: [B or 1, 1 or H, Q, K] bool or additive float.
        q_pos: [Q] slots.
        k_pos: [K] slots.
        low: [B or 1, Q] first visible slot, contiguous, with `high`.
        high: [B or 1, Q] slot after the last visible one.
        groups: as in `pack.Packed`, like the rest up to `roll_start`.
        active: [P, B].
        tables: [P, 3, B, H, G].
        key_slope: [P, B, 1 or H, K0].
        key_weight: [B, K0].
        hidden: [N, 3, B].
        roll_start: [B].
        scale: factor on q.k.
        softcap: 0 for none.
        n_groups: joint groups.
        rolling: as in `pack.Packed`.
        causal: keys after the query are invisible.
        consecutive: k_pos counts up by one, so that keys outside [low, high) need not be read.
    """
    batch, heads, queries, size = q.shape
    n_kv, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    pointer, floor = q_pos, 0.0
    strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        spread = mask.expand(batch, heads, queries, keys)
        strides = spread.stride()[:3]
        pointer = spread.view(torch.uint8) if mask.dtype == torch.bool else spread
        floor = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    table = next((x.shape[-1] for x in (groups, key_slope, key_weight) if x is not None), 0)
    radix, digit, roll_group, nearest, farthest = rolling
    pointers = [
        q,
        k,
        v,
        pointer,
        q_pos,
        k_pos,
        low,
        high,
        groups,
        active,
        tables,
        key_slope,
        key_weight,
        hidden,
        roll_start,
    ]
    slope_heads = 1 if key_slope is None else key_slope.shape[2]
    numbers = [scale, softcap or 1.0, floor, batch, heads, n_kv, queries, keys, table, slope_heads]
    span = 0 if low is None or low.shape[0] == 1 else queries
    constants = {
        "D": size,
        "DV": size_v,
        "BD": power_of_two(size, 16),
        "BDV": power_of_two(size_v, 16),
        "SHARED": heads // n_kv,
        "G": n_groups,
        "P": active.shape[0],
        "HIDDEN": 0 if hidden is None else hidden.shape[0],
        "TABLES": tables is not None,
        "KEY_SLOPE": key_slope is not None,
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "CAUSAL": causal,
        "SPANS": low is not None,
        "CONSECUTIVE": consecutive,
        "SOFTCAP": softcap > 0,
        "ROLL": roll_start is not None,
        "RADIX": radix,
        "SIZE": digit,
        "ROLL_GROUP": roll_group,
        "NEAREST": nearest,
        "FARTHEST": farthest,
        "CAST": must_cast(q.dtype),
        "PRECISION": precision(q.dtype),
    }
    return [*pointers, *numbers, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides, span], constants
