"""Writing one token into a cache: the kernel against indexing."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import DTYPES, launching
from vlmfix.kernels.kv_write import kv_write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "size_v"), [(16, 16), (80, 32), (128, 256)])
def test_one_slot_changes(place, dtype, size, size_v):
    keys, values = place.randn(2, 3, 9, size, dtype=dtype), place.randn(2, 3, 9, size_v, dtype=dtype)
    k = place.randn(2, 3, 1, size, dtype=dtype)
    v = place.randn(2, 1, 3, size_v, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    want_keys, want_values = keys.clone(), values.clone()
    want_keys[:, :, 5], want_values[:, :, 5] = k[:, :, 0], v[:, :, 0]
    with launching("kv_write"):
        kv_write(keys, values, k, v, place.tensor([5]))
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)


def test_wrong_shapes_are_named():
    cache, token = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 1, 8)
    slot = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="k "):
        kv_write(cache, cache, torch.zeros(1, 2, 2, 8), token, slot)
    with pytest.raises(ValueError, match="v "):
        kv_write(cache, cache, token, torch.zeros(1, 1, 1, 8), slot)
