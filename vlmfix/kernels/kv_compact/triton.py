"""Keeping some keys and values of a cache: one read and one write of what is kept."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmfix.kernels.dispatch import ceil_div, launches, operation, power_of_two


@triton.jit
def _compact(
    K, V, Keep, OutK, OutV, n_kv, n, k_b, k_h, k_n, v_b, v_h, v_n, keep_b, keep_h, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: N kept entries of one key/value head."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_kv
    h = bh % n_kv
    j = tl.program_id(0) * N + tl.arange(0, N)
    here = j < n
    source = tl.load(Keep + b * keep_b + h * keep_h + j, mask=here, other=-1).to(tl.int64)
    d = tl.arange(0, BD)
    ok = (source >= 0)[:, None]
    k = tl.load(K + b * k_b + h * k_h + source[:, None] * k_n + d[None, :], mask=ok & (d < D)[None, :], other=0.0)
    v = tl.load(V + b * v_b + h * v_h + source[:, None] * v_n + d[None, :], mask=ok & (d < DV)[None, :], other=0.0)
    line = (bh * n + j)[:, None]
    tl.store(OutK + line * D + d[None, :], k, mask=here[:, None] & (d < D)[None, :])
    tl.store(OutV + line * DV + d[None, :], v, mask=here[:, None] & (d < DV)[None, :])


@operation("kv_compact")
def kv_compact(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.kv_compact`."""
    batch, n_kv, _, size = k.shape
    size_v, n = v.shape[3], keep.shape[-1]
    keep = keep.contiguous()
    out = k.new_empty(batch, n_kv, n, size), v.new_empty(batch, n_kv, n, size_v)
    wide = power_of_two(max(size, size_v), 16)
    step = max(1, 4096 // wide)
    launches["kv_compact"] += 1
    _compact[(ceil_div(n, step), batch * n_kv)](
        k, v, keep, *out, n_kv, n, *k.stride()[:3], *v.stride()[:3], keep.stride(0),
        0 if keep.ndim == 2 else keep.stride(1), D=size, DV=size_v, BD=wide, N=step, num_warps=4,
    )  # fmt: skip
    return out


@kv_compact.register_fake
def _(k, v, keep):
    n = keep.shape[-1]
    return k.new_empty(*k.shape[:2], n, k.shape[3]), v.new_empty(*v.shape[:2], n, v.shape[3])
