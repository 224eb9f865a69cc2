"""Rotary embedding of queries and keys: the kernel against transformers' definition."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.kernels.tools import DTYPES, launching
from vlmfix.kernels import dispatch
from vlmfix.kernels.rotary import reference, rotary, rotary_gradients

SIZES = [16, 64, 80, 96, 128, 256]


def inputs(place, dtype, batch=2, heads=5, heads_kv=2, length=3, size=16, rows=None, exact=False):
    """As the projections leave q and k; with `exact` no result needs rounding in any type.

    The halves of cos and sin differ, so that none of the four is taken for another.
    """
    numbers = [(batch, length, heads, size), (batch, length, heads_kv, size), *[(rows or batch, length, size)] * 2]
    if exact:
        q, k, cos, sin = (place.randint(-4, 5, shape).to(dtype) for shape in numbers)
        cos, sin = cos / 4, sin / 4
    else:
        q, k, cos, sin = (place.randn(*shape, dtype=dtype) for shape in numbers)
        cos, sin = cos.cos(), sin.sin()
    return q.transpose(1, 2), k.transpose(1, 2), cos, sin


def check(got, want, x):
    """Bitwise, except that the interpreter cuts bfloat16 off where a GPU rounds it: two ulps of the larger terms."""
    if dispatch.must_cast(got.dtype):
        terms = x.double().abs() + x.double().roll(x.shape[-1] // 2, -1).abs()  # cos and sin are at most 1
        assert bool(((got.double() - want.double()).abs() <= 2 * torch.finfo(got.dtype).eps * terms).all())
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_definition(place, dtype, size):
    for exact in (True, False):
        q, k, cos, sin = inputs(place, dtype, size=size, heads=place(5, 32), length=place(2, 77), exact=exact)
        assert not q.is_contiguous()
        with launching("rotary"):
            got = rotary(q, k, cos, sin)
        for x, y, want in zip((q, k), got, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
            if exact:
                torch.testing.assert_close(y, want, rtol=0, atol=0)
            else:
                check(y, want, x)


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "length": 1, "heads": 32, "heads_kv": 32, "size": 128},
        {"batch": 3, "length": 1, "heads": 7, "heads_kv": 1},
        {"batch": 3, "length": 2, "heads": 1, "heads_kv": 1, "rows": 1},
        {"batch": 2, "length": 5, "heads": 14, "heads_kv": 2, "rows": 1},
    ],
    ids=str,
)
def test_shapes(place, shape):
    q, k, cos, sin = inputs(place, torch.float32, **shape)
    before = dispatch.launches["rotary"]
    got = rotary(q, k, cos, sin)
    assert dispatch.launches["rotary"] == before + 1
    torch.testing.assert_close(got, apply_rotary_pos_emb(q, k, cos, sin), rtol=0, atol=0)


def test_views_of_one_projection(place):
    """Queries and keys cut from one tensor, cos and sin expanded and cut from a table."""
    fused = place.randn(2, 3, 6, 32)
    q, k = fused[:, :, :4].transpose(1, 2), fused[:, :, 4:].transpose(1, 2)
    table = place.randn(9, 64)
    cos, sin = (x[None].expand(2, -1, -1) for x in (table[2:5, :32], table[2:5, 32:]))
    with launching("rotary"):
        got = rotary(q, k, cos, sin)
    torch.testing.assert_close(got, apply_rotary_pos_emb(q, k, cos, sin), rtol=0, atol=0)
    q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))  # last dimension not contiguous
    with launching("rotary"):
        again = rotary(q, k, cos, sin)
    torch.testing.assert_close(again, got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_gradients(place, dtype, size):
    q, k, cos, sin = inputs(place, dtype, size=size, exact=dispatch.must_cast(dtype))
    ours = [x.clone().requires_grad_() for x in (q, k)]
    theirs = [x.clone().requires_grad_() for x in (q, k)]
    with launching("rotary"):
        out = rotary(*ours, cos, sin)
    want_out = apply_rotary_pos_emb(*theirs, cos, sin)
    grads = tuple(place.randint(-4, 5, x.transpose(1, 2).shape).to(dtype).transpose(1, 2) for x in out)
    with launching("rotary_gradient"):
        got = torch.autograd.grad(out, ours, grads)
    torch.testing.assert_close(got, torch.autograd.grad(want_out, theirs, grads), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_many_gradients_at_once(place, rows):
    q, k, cos, sin = inputs(place, torch.float32, rows=rows)
    q, k = q.requires_grad_(), k.requires_grad_()
    out = rotary(q, k, cos, sin)
    grads = tuple(place.randn(4, *x.shape) for x in out)

    def pull(*one):
        return torch.autograd.grad(out, (q, k), one, retain_graph=True)

    singly = [pull(*one) for one in zip(*grads, strict=True)]
    before = dispatch.launches["rotary_gradient"]
    got = torch.vmap(pull)(*grads)
    assert dispatch.launches["rotary_gradient"] == before + 1
    torch.testing.assert_close(got, tuple(torch.stack(x) for x in zip(*singly, strict=True)), rtol=0, atol=0)
    moved = torch.vmap(pull, in_dims=(1, 3))(grads[0].movedim(0, 1), grads[1].movedim(0, 3))
    torch.testing.assert_close(moved, got, rtol=0, atol=0)
    alone = torch.vmap(lambda one: torch.autograd.grad(out[1], k, one, retain_graph=True)[0])(grads[1])
    torch.testing.assert_close(alone, got[1], rtol=0, atol=0)


def test_a_compiler_sees_the_definition(place):
    torch.compiler.reset()
    q, k, cos, sin = inputs(place, torch.float32)
    before = dispatch.launches["rotary"]
    got = torch.compile(rotary, backend="eager", fullgraph=True)(q.requires_grad_(), k, cos, sin)
    assert dispatch.launches["rotary"] == before
    torch.testing.assert_close(got, apply_rotary_pos_emb(q, k, cos, sin), rtol=0, atol=0)


@pytest.mark.parametrize("other", ["type", "double", "axis", "fewer rows"])
def test_anything_else_is_the_definition(place, other):
    q, k, cos, sin = inputs(place, torch.float16)
    dim = 1
    if other == "type":
        cos, sin = cos.float(), sin.float()
    elif other == "double":
        q, k, cos, sin = (x.double() for x in (q, k, cos, sin))
    elif other == "axis":
        q, k, dim = q.transpose(1, 2), k.transpose(1, 2), 2
    else:
        cos, sin = cos[:, :1], sin[:, :1]
    before = dispatch.launches["rotary"]
    got, want = rotary(q, k, cos, sin, dim), apply_rotary_pos_emb(q, k, cos, sin, dim)
    assert dispatch.launches["rotary"] == before
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[0].dtype == want[0].dtype


def test_gradients_of_the_definition():
    q, k = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 1, 3, 4, dtype=torch.float64)
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(rotary, (q.requires_grad_(), k.requires_grad_(), cos, sin), check_batched_grad=True)
    grad = torch.randn(3, 2, 2, 3, 4, dtype=torch.float64)
    out = reference.rotary(q, k, cos, sin)[0]
    for one, got in zip(grad, *rotary_gradients((grad,), cos, sin), strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, q, one, retain_graph=True)[0], rtol=0, atol=0)


def test_only_what_is_traced_gets_a_gradient():
    q, k, cos, sin = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    out = rotary(q, k.requires_grad_(), cos.requires_grad_(), sin)
    assert [x.requires_grad for x in out] == [False, True]
    with torch.no_grad():
        assert not rotary(q, k, cos, sin)[1].requires_grad
    out[1].sum().backward()
    assert cos.grad is None
    want = reference.rotary_gradient(torch.ones(1, *k.shape), cos.detach(), sin)[0]
    torch.testing.assert_close(k.grad, want, rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_refused():
    q, angles = torch.zeros(1, 2, 3, 8), torch.zeros(1, 3, 4)
    with pytest.raises(RuntimeError, match="must match"):
        rotary(q, q, angles, angles)
