"""Attention of one token over a cache of fixed size: its gradients against autograd through the whole cache."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.tools import DTYPES, launching
from vlmfix.attention.saliency import _row
from vlmfix.hf.attend import Look
from vlmfix.hf.slots import Frame, SlotCache, SlotLayer
from vlmfix.hf.tracing import attend_one


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(place, dtype, sinks):
    batch, heads, n_kv, size, capacity, at, count = 2, 4, 2, 16, place(40, 700), place(33, 650), 3
    query = place.randn(batch, heads, 1, size, dtype=dtype)
    keys, values = (place.randn(batch, n_kv, capacity, size, dtype=dtype) for _ in range(2))
    slot, start = place.tensor([at]), place.tensor([[0], [5]])
    layer = SlotLayer(keys, values, slot, None)
    frame = Frame(SlotCache(layers=[layer]), slot, start, place.tensor(2))
    frame.begin()
    fed = tuple(x[:, :, at : at + 1].clone().requires_grad_() for x in (keys, values))
    extra = place.randn(heads) if sinks else None
    query.requires_grad_()
    upstream = place.randn(count, batch, heads, 1, size, dtype=dtype)

    with launching("grouped_split", "saliency_row"):
        out, _ = attend_one(query, fed, keys, values, frame, frame.seen(0), size**-0.5, extra, None)
        got = torch.vmap(lambda one: torch.autograd.grad(out, (query, *fed), one))(upstream)

    leaves = [x.detach().double().requires_grad_() for x in (query, *fed)]
    key, value = (x.double().index_copy(2, slot, own) for x, own in zip((keys, values), leaves[1:], strict=True))
    z = leaves[0] @ key.repeat_interleave(2, 1).mT * size**-0.5
    z = z.masked_fill(~frame.seen(0).mask, float("-inf"))
    if extra is not None:
        z = torch.cat([z, extra.double()[None, :, None, None].expand(batch, -1, 1, 1)], -1)
    exact = z.softmax(-1)[..., :capacity] @ value.repeat_interleave(2, 1)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    for c in range(count):
        want = torch.autograd.grad(exact, leaves, upstream[c].double(), retain_graph=True)
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine[c].double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_saliency_of_what_is_known(place, sinks):
    """The kernel's saliency of a traced layer is that of its probabilities."""
    batch, heads, n_kv, size, capacity, at = 2, 4, 2, 16, place(40, 700), place(33, 650)
    query = place.randn(batch, heads, 1, size)
    keys, values = (place.randn(batch, n_kv, capacity, size) for _ in range(2))
    slot, start = place.tensor([at]), place.tensor([[0], [5]])
    frame = Frame(SlotCache(layers=[SlotLayer(keys, values, slot, None)]), slot, start, place.tensor(2))
    frame.begin()
    seen, how = frame.seen(0), {"softcap": None, "sinks": place.randn(heads) if sinks else None, "causal": True}
    fed = tuple(x[:, :, at : at + 1].clone() for x in (keys, values))
    out, known = attend_one(query.requires_grad_(), fed, keys, values, frame, seen, size**-0.5, how["sinks"], None)
    assert out.requires_grad
    look = Look(query.detach(), keys, values, seen.mask, size**-0.5, slot, how, seen.k_pos)
    grad = place.randn(batch, 3, heads, size)
    plain = _row(look, ())(grad)
    with launching("saliency_row"), torch.no_grad():
        got = _row(replace(look, known=known), ())(grad)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
