"""Keeping some keys and values of a cache: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_compact(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the kept entries of each row.

    Args:
        k: [B, Hkv, K, D].
        v: [B, Hkv, K, Dv].
        keep: [B, n] or [B, Hkv, n] indices in the wanted order; a negative index leaves zeros (padding).

    Returns:
        k [B, Hkv, n, D] and v [B, Hkv, n, Dv].
    """
    keep = keep[:, None].expand(-1, k.shape[1], -1) if keep.ndim == 2 else keep
    return _kept(k, keep), _kept(v, keep)


def _kept(x: Tensor, keep: Tensor) -> Tensor:
    taken = x.gather(2, keep.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))
    return torch.where((keep >= 0)[..., None], taken, torch.zeros((), dtype=x.dtype, device=x.device))
