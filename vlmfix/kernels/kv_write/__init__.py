"""Writing one token's keys and values into a cache of fixed size: check, choose, call."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.kv_write import reference


def kv_write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slot: Tensor) -> None:
    """Writes in place; arguments as in `reference.kv_write`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if k.shape[2] != 1 or keys.shape[:2] != k.shape[:2] or keys.shape[3] != k.shape[3]:
        raise ValueError(f"k {tuple(k.shape)}: expected one token of a cache {tuple(keys.shape)}")
    if v.shape[2] != 1 or values.shape[:2] != v.shape[:2] or values.shape[3] != v.shape[3]:
        raise ValueError(f"v {tuple(v.shape)}: expected one token of a cache {tuple(values.shape)}")
    if torch.compiler.is_compiling() or not use_triton(keys, values, k, v):  # a compiler fuses the definition
        reference.kv_write(keys, values, k, v, slot)
        return
    from vlmfix.kernels.kv_write import triton

    triton.kv_write(keys, values, rows_contiguous(k), rows_contiguous(v), slot)
