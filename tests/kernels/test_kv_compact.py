"""Cache compaction: the kernel against indexing."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import DTYPES, launching
from vlmfix.kernels.kv_compact import kv_compact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_kept_entries(place, dtype, per_head):
    keys, n = place(37, 700), place(9, 333)
    k, v = place.randn(2, 3, keys, 80, dtype=dtype), place.randn(2, 3, keys, 32, dtype=dtype)
    keep = place.randint(0, keys, (2, 3, n) if per_head else (2, n))
    keep[1, ..., -2:] = -1  # padding
    with launching("kv_compact"):
        got = kv_compact(k, v.transpose(2, 3).contiguous().transpose(2, 3), keep)
    for out, x in zip(got, (k, v), strict=True):
        for b in range(2):
            for h in range(3):
                index = keep[b, h] if per_head else keep[b]
                want = torch.where((index >= 0)[:, None], x[b, h, index.clamp(min=0)], 0)
                assert torch.equal(out[b, h], want)


def test_wrong_shapes_are_named():
    k = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="keep"):
        kv_compact(k, k, torch.zeros(1, 3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="equal rows"):
        kv_compact(k, torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, dtype=torch.long))
