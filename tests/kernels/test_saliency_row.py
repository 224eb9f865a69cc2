"""Saliency row: the definition against autograd, the kernel against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import DTYPES, launching, within_budget
from vlmfix.kernels.dispatch import reference_only
from vlmfix.kernels.saliency_row import saliency_row


def problem(place, batch, heads, n_kv, keys, size, count, dtype=torch.float32, biased=False):
    q = place.randn(batch, heads, 1, size, dtype=dtype)
    k, v = place.randn(batch, n_kv, keys, size, dtype=dtype), place.randn(batch, n_kv, keys, size, dtype=dtype)
    d_out = place.randn(batch, count, heads, size)
    own = place.tensor([keys - 1 - 3 * (b % 2) for b in range(batch)])
    start = place.tensor([keys // 5 * (b % 2) for b in range(batch)])
    bias = place.randn(1, heads, keys) if biased else None
    slots = place.arange(keys)
    seen = (slots <= own[:, None]) & (slots >= start[:, None])
    z = (q.double() @ k.double().repeat_interleave(heads // n_kv, 1).mT)[:, :, 0] * size**-0.5
    z = z if bias is None else z + bias.double()
    lse = z.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    return (q, k, v, lse, d_out, size**-0.5, own), {"start": start, "bias": bias}, seen


def test_definition_is_the_gradient():
    """dq, dk and dv of the row's own slot equal autograd; the saliency is |A dP| with A an independent leaf."""
    from tests.kernels.tools import Place

    torch.manual_seed(2)
    (q, k, v, lse, d_out, scale, own), kw, seen = problem(Place("cpu"), 2, 4, 2, 19, 8, 3, torch.float64, True)
    d_out = d_out.double()
    got = saliency_row(q, k, v, lse, d_out, scale, own, **kw)
    for b in range(2):
        for c in range(3):
            leaves = [q[b, :, 0].clone(), k[b, :, own[b]].clone(), v[b, :, own[b]].clone()]
            query, key, value = (x.requires_grad_() for x in leaves)
            keys, values = k[b].clone(), v[b].clone()
            keys[:, own[b]], values[:, own[b]] = key, value
            z = torch.einsum("hd,hnd->hn", query, keys.repeat_interleave(2, 0)) * scale + kw["bias"][0].double()
            a = z.masked_fill(~seen[b], float("-inf")).softmax(-1)
            out = torch.einsum("hn,hnd->hd", a, values.repeat_interleave(2, 0))
            da, dq, dk, dv = torch.autograd.grad((out * d_out[b, c]).sum(), (a, query, key, value))
            torch.testing.assert_close(got.saliency[b, c], (a * da).abs().sum(0).detach())
            for mine, theirs in ((got.dq, dq), (got.dk_self, dk), (got.dv_self, dv)):
                torch.testing.assert_close(mine[b, c], theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "n_kv", "size", "count"), [(2, 2, 16, 1), (6, 2, 80, 5)])
def test_kernel(place, dtype, heads, n_kv, size, count):
    arguments, kw, _ = problem(place, 2, heads, n_kv, place(37, 1500), size, count, dtype, biased=count == 5)
    exact = saliency_row(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments), **kw)
    arguments = (*arguments[:3], arguments[3].float(), *arguments[4:])
    with reference_only():
        plain = saliency_row(*arguments, **kw)
    with launching("saliency_row"):
        actual = saliency_row(*arguments, **kw)
    for one, two, three in zip(actual, plain, exact, strict=True):
        within_budget(one, two, three, torch.float32)


def test_slots_cut_from_a_table(place):
    arguments, kw, _ = problem(place, 2, 4, 2, 37, 16, 3)
    table = torch.stack([arguments[6], kw["start"], kw["start"] * 0], 1)
    want = saliency_row(*arguments, **kw)
    got = saliency_row(*arguments[:6], table[:, 0], start=table[:, 1])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_another_type(place, dtype):
    arguments, kw, _ = problem(place, 2, 6, 2, 37, 16, 3)
    wide = saliency_row(*arguments, **kw)
    with launching("saliency_row"):
        got = saliency_row(*arguments, **kw, dtype=dtype)
    torch.testing.assert_close(got.saliency, wide.saliency, rtol=0, atol=0)
    alone = saliency_row(*arguments, **kw, dtype=dtype, only_gradients=True)
    torch.testing.assert_close(alone[1:], got[1:], rtol=0, atol=0)
    assert alone.saliency.shape == (2, 3, 0)
    with reference_only():
        plain = saliency_row(*arguments, **kw, dtype=dtype)
        assert saliency_row(*arguments, **kw, only_gradients=True).saliency.shape == (2, 3, 0)
    for one, two, three in zip(got[1:], plain[1:], wide[1:], strict=True):
        assert one.dtype == two.dtype == dtype
        torch.testing.assert_close(one.float(), three, rtol=torch.finfo(dtype).eps, atol=1e-7)
        torch.testing.assert_close(two.float(), three, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-5)


def test_far_from_the_log_sum_exp(place):
    """z - lse is not rounded to float32 on the way: at 60 that alone would cost 16 roundings of the result."""
    heads, size = 32, 16
    q, k, d_out = place.randn(1, heads, 1, size), place.randn(1, heads, 1, size), place.randn(1, 1, heads, 1) + 3
    lse = 60 * place.rand(1, heads)
    own = place.tensor([0])
    v = place.randn(1, heads, 1, 1)
    with launching("saliency_row"):
        actual = saliency_row(q, k, v, lse, d_out, size**-0.5, own).dv_self[0, 0, :, 0].double()
    z = (q.double() * k.double()).sum(-1)[0, :, 0] * size**-0.5
    exact = (z - lse[0].double()).exp() * d_out[0, 0, :, 0].double()
    assert ((actual - exact) / exact).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_wrong_shapes_are_named():
    q, k = torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="one query row"):
        saliency_row(q, k, k, torch.zeros(1, 2), torch.zeros(1, 1, 2, 8), 1.0, torch.tensor([4]))
    with pytest.raises(ValueError, match="d_out"):
        saliency_row(q[:, :, :1], k, k, torch.zeros(1, 2), torch.zeros(1, 1, 3, 8), 1.0, torch.tensor([4]))
