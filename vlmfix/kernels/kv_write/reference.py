"""Writing one token's keys and values into a cache of fixed size: the definition."""

from __future__ import annotations

from torch import Tensor


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Writes in place.

    Args:
        keys: [B, Hkv, C, D], changed.
        values: [B, Hkv, C, Dv], changed.
        k: [B, Hkv, 1, D].
        v: [B, Hkv, 1, Dv].
        slot: [1] int64 place on the third axis.
    """
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, v)
