"""Writing one token's keys and values into a cache of fixed size: one launch for both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import launches, power_of_two


@triton.jit
def _write(
    Keys, Values, K, V, Slot, n_kv, keys_b, keys_h, keys_n, values_b, values_h, values_n, k_b, k_h, v_b, v_h,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: one key/value head of one row."""
    bh = tl.program_id(0).to(tl.int64)
    b = bh // n_kv
    h = bh % n_kv
    slot = tl.load(Slot)
    d = tl.arange(0, BD)
    k = tl.load(K + b * k_b + h * k_h + d, mask=d < D, other=0.0)
    v = tl.load(V + b * v_b + h * v_h + d, mask=d < DV, other=0.0)
    tl.store(Keys + b * keys_b + h * keys_h + slot * keys_n + d, k, mask=d < D)
    tl.store(Values + b * values_b + h * values_h + slot * values_n + d, v, mask=d < DV)


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """As `reference.kv_write`; last dimensions contiguous."""
    size, size_v = k.shape[3], v.shape[3]
    launches["kv_write"] += 1
    _write[(keys.shape[0] * keys.shape[1],)](
        keys, values, k, v, slot, keys.shape[1], *keys.stride()[:3], *values.stride()[:3], *k.stride()[:2],
        *v.stride()[:2], D=size, DV=size_v, BD=power_of_two(max(size, size_v), 16), num_warps=1,
    )  # fmt: skip
