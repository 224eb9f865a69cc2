"""Small layers in one launch: the kernels against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import DTYPES, launching, within_budget
from vlmfix.kernels.rms_norm import reference as norms
from vlmfix.kernels.rms_norm import rms_norm, rms_norm_gradient
from vlmfix.kernels.silu_mul import reference as products
from vlmfix.kernels.silu_mul import silu_mul, silu_mul_gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 80, 3584])
def test_norm(place, dtype, size):
    x = place.randn(2, 1, size, dtype=dtype) * 3
    weight = 1 + place.randn(size, dtype=dtype) / 4
    with launching("rms_norm"):
        got = rms_norm(x, weight, 1e-5)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    exact = exact.to(dtype).double() * weight.double()
    close = (got.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 1e-30
    assert bool(close.all())
    torch.testing.assert_close(got, norms.rms_norm(x, weight, 1e-5), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 80, 3584])
def test_gradient_of_a_norm(place, dtype, size):
    x = (place.randn(2, 1, size, dtype=dtype) * 3).requires_grad_()
    weight = 1 + place.randn(size, dtype=dtype) / 4
    grads = place.randn(5, 2, 1, size, dtype=dtype)
    with launching("rms_norm", "rms_norm_gradient"):
        out = rms_norm(x, weight, 1e-5)
        got = torch.vmap(lambda one: torch.autograd.grad(out, x, one, retain_graph=True)[0])(grads)
    exact_x = x.detach().double().requires_grad_()
    exact = norms.rms_norm(exact_x, weight.double(), 1e-5)
    want = torch.stack([torch.autograd.grad(exact, exact_x, one.double(), retain_graph=True)[0] for one in grads])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    one = torch.autograd.grad(out, x, grads[0])[0]
    torch.testing.assert_close(one, got[0], rtol=0, atol=0)


def test_definition_of_the_gradient_of_a_norm():
    x = torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_()
    weight, grads = torch.randn(8, dtype=torch.float64), torch.randn(2, 2, 3, 8, dtype=torch.float64)
    out = norms.rms_norm(x, weight, 1e-3)
    for one, got in zip(grads, rms_norm_gradient(grads, x, weight, 1e-3), strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(out, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(place, dtype):
    gate, up = place.randn(3, 1, 1100, dtype=dtype) * 4, place.randn(3, 1, 1100, dtype=dtype)
    with launching("silu_mul"):
        got = silu_mul(gate, up)
    rtol = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(got, products.silu_mul(gate, up), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_product(place, dtype):
    gate, up = place.randn(3, 1, 1100, dtype=dtype) * 4, place.randn(3, 1, 1100, dtype=dtype)
    gate[0, 0, :2] = place.tensor([-80.0, 80.0], dtype)
    grads = place.randn(5, 3, 1, 1100, dtype=dtype)

    def pulled(function, kind):
        leaves = [x.to(kind).requires_grad_() for x in (gate, up)]
        out = function(*leaves)
        return torch.vmap(lambda one: torch.autograd.grad(out, leaves, one, retain_graph=True))(grads.to(kind))

    with launching("silu_mul", "silu_mul_gradient"):
        got = pulled(silu_mul, dtype)
    plain, exact = pulled(products.silu_mul, dtype), pulled(products.silu_mul, torch.float64)
    for one, usual, true in zip(got, plain, exact, strict=True):
        assert one.dtype == dtype
        within_budget(one, usual, true, dtype)
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    alone = torch.autograd.grad(silu_mul(*leaves), leaves, grads[2])
    torch.testing.assert_close(alone, tuple(x[2] for x in got), rtol=0, atol=0)


def test_definition_of_the_gradient_of_a_product():
    gate, up = (torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    grads = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    out = products.silu_mul(gate, up)
    got = silu_mul_gradient(grads, gate.detach(), up.detach())
    want = torch.vmap(lambda one: torch.autograd.grad(out, (gate, up), one, retain_graph=True))(grads)
    torch.testing.assert_close(got, want)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 8), torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match="gate"):
        silu_mul(torch.zeros(2, 8), torch.zeros(2, 4))
