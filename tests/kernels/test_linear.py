"""Products of a few rows with weight matrices: the kernels against their definitions."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.tools import launching, within_budget
from vlmfix.kernels import dispatch
from vlmfix.kernels.linear import ALONE, ROWS, gated_linear, linears, linears_gradient, reference

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("rows", "sizes"),
    [*product((1, 2, ALONE), [(48,), (70, 33), (96, 16, 40)]), (ALONE + 1, (70, 33)), (ROWS, (96, 16, 40))],
    ids=str,
)
def test_layers_of_one_input(place, dtype, rows, sizes):
    width = place(90, 1500)
    x = place.randn(rows, 1, width, dtype=dtype)
    weights = [place.randn(place(n, 37 * n), width, dtype=dtype) / width**0.5 for n in sizes]
    biases = [place.randn(len(weight), dtype=dtype) if rows % 2 else None for weight in weights]
    with launching("linears"):
        got = linears(x, weights, biases)
    exact = reference.linears(
        x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    )
    plain = reference.linears(x, weights, biases)
    for one, usual, true in zip(got, plain, exact, strict=True):
        assert one.dtype == dtype
        within_budget(one, usual, true, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_gated(place, dtype, rows):
    width, n = place(90, 1500), place(70, 4100)
    x = place.randn(rows, 1, width, dtype=dtype)
    gate, up = (place.randn(n, width, dtype=dtype) / width**0.5 for _ in range(2))
    with launching("gated_linear"):
        got = gated_linear(x, gate, up)
    exact = reference.gated_linear(x.double(), gate.double(), up.double())
    within_budget(got, reference.gated_linear(x, gate, up), exact, dtype)


def test_a_row_does_not_depend_on_the_others(place):
    x, weight = (place.randn(n, 64, dtype=torch.float16) for n in (16, 40))
    (together,) = linears(x, [weight], [None])
    for i in (0, 7, 15):
        torch.testing.assert_close(linears(x[i : i + 1], [weight], [None])[0][0], together[i], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64,), (2, 1, 2, 64)], ids=str)
def test_any_number_of_dimensions(place, shape):
    half = torch.float16
    x, gate, up = (place.randn(*size, dtype=half) for size in (shape, (40, 64), (40, 64)))
    with launching("linears", "gated_linear"):
        assert [y.shape for y in linears(x, [gate, up], [None] * 2)] == [(*shape[:-1], 40)] * 2
        got = gated_linear(x, gate, up)
    torch.testing.assert_close(got, reference.gated_linear(x, gate, up), rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(gated_linear(x.requires_grad_(), gate, up).detach(), got, rtol=0, atol=0)


def test_what_the_kernels_leave_to_others(place):
    half = torch.float16
    x, many = place.randn(4, 64, dtype=half), place.randn(ROWS + 1, 64, dtype=half)
    four = [place.randn(16, 64, dtype=half) for _ in range(4)]
    before = dispatch.launches.copy()
    linears(x, four, [None] * 4)
    linears(x, four[:2], [None, place.randn(16, dtype=half)])
    linears(many, four[:2], [None] * 2)
    linears(many[: ALONE + 1], four[:1], [None])
    linears(x, [place.randn(64, 16, dtype=half).T], [None])
    linears(x.float(), [four[0].float()], [None])
    gated_linear(many, *four[:2])
    assert dispatch.launches == before


def pulled(out, x, grads):
    """Gradients [C, ...] of x for gradients [C, ...] of each result."""
    return torch.vmap(lambda *one: torch.autograd.grad(out, x, one, retain_graph=True)[0])(*grads)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_gradient_of_layers(place, dtype, rows):
    width = place(90, 1500)
    x = place.randn(rows, 1, width, dtype=dtype).requires_grad_()
    weights = [place.randn(place(n, 37 * n), width, dtype=dtype) / width**0.5 for n in (48, 16, 33)]
    biases = [place.randn(len(weight), dtype=dtype) for weight in weights]
    before = dispatch.launches["linears"]
    out = linears(x, weights, biases)
    assert dispatch.launches["linears"] == before + (dtype in HALVES)
    assert all(part.is_contiguous() for part in out)
    torch.testing.assert_close([part.detach() for part in out], [*linears(x.detach(), weights, biases)], rtol=0, atol=0)
    grads = [place.randn(5, *part.shape, dtype=dtype) for part in out]
    plain_x, exact_x = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    plain = pulled(reference.linears(plain_x, weights, biases), plain_x, grads)
    wide = [[y.double() for y in part] for part in (weights, biases, grads)]
    exact = pulled(reference.linears(exact_x, *wide[:2]), exact_x, wide[2])
    before = dispatch.launches["linears_gradient"]
    got = pulled(out, x, grads)
    assert dispatch.launches["linears_gradient"] == before + (dtype in HALVES and 5 * rows <= ROWS)
    assert got.dtype == dtype
    within_budget(got, plain, exact, dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_gradient_of_a_gated_layer(place, dtype, rows):
    width, n = place(90, 1500), place(70, 4100)
    x = place.randn(rows, 1, width, dtype=dtype).requires_grad_()
    gate, up = (place.randn(n, width, dtype=dtype) / width**0.5 for _ in range(2))
    half = dtype in HALVES
    few = half and 5 * rows <= ROWS
    with launching("gated_linear" if half else "silu_mul", "silu_mul_gradient", *["linears_gradient"] * few):
        out = gated_linear(x, gate, up)
        torch.testing.assert_close(out.detach(), gated_linear(x.detach(), gate, up), rtol=0, atol=0 if half else 1e-6)
        grads = [place.randn(5, *out.shape, dtype=dtype)]
        got = pulled([out], x, grads)
    plain_x, exact_x = x.detach().clone().requires_grad_(), x.detach().double().requires_grad_()
    plain_out = reference.gated_linear(plain_x, gate, up)
    exact_out = reference.gated_linear(exact_x, gate.double(), up.double())
    within_budget(out.detach(), plain_out.detach(), exact_out.detach(), dtype)
    exact = pulled([exact_out], exact_x, [grads[0].double()])
    within_budget(got, pulled([plain_out], plain_x, grads), exact, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 17, 32])
@pytest.mark.parametrize("sizes", [(70,), (33, 64), (7, 130, 40)], ids=str)
def test_gradients_over_many_shares(place, dtype, rows, sizes, monkeypatch):
    width = place(70, 1500)
    triton_gradient = pytest.importorskip("vlmfix.kernels.linear.triton_gradient")
    grads = [place.randn(rows, place(n, 37 * n), dtype=dtype) for n in sizes]
    weights = [place.randn(grad.shape[1], width, dtype=dtype) / width**0.5 for grad in grads]
    exact = reference.linears_gradient([g.double() for g in grads], [w.double() for w in weights])
    plain = reference.linears_gradient(grads, weights)
    with launching("linears_gradient"):
        within_budget(linears_gradient(grads, weights), plain, exact, dtype)
    usual = triton_gradient.launch([len(w) for w in weights], width, rows, grads[0].device.index)
    for shares in (1, 3, 8):
        monkeypatch.setattr(triton_gradient, "launch", lambda *_, n=shares: usual._replace(shares=n))
        within_budget(linears_gradient(grads, weights), plain, exact, dtype)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_gradients_of_some_layers(used):
    """Outputs that nothing depends on have no gradient; one candidate or many give the same."""
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 8, dtype=torch.float64) for n in (4, 5, 6)]
    ours, theirs = linears(x, weights, [None] * 3), reference.linears(x, weights, [None] * 3)
    grads = [torch.randn(4, *ours[i].shape, dtype=torch.float64) for i in used]
    got = pulled([ours[i] for i in used], x, grads)
    torch.testing.assert_close(got, pulled([theirs[i] for i in used], x, grads))
    for c in range(4):
        (one,) = torch.autograd.grad([ours[i] for i in used], x, [grad[c] for grad in grads], retain_graph=True)
        torch.testing.assert_close(one, got[c])


def test_definition_of_the_gradient_of_layers():
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 8, dtype=torch.float64) for n in (4, 5)]
    out = reference.linears(x, weights, [None] * 2)
    grads = [torch.randn(3, *part.shape, dtype=torch.float64) for part in out]
    want = pulled(out, x, grads)
    torch.testing.assert_close(reference.linears_gradient(grads, weights), want)
    torch.testing.assert_close(linears_gradient(grads, weights), want)


def test_many_gradients_of_which_one_is_shared():
    x = torch.randn(2, 8, requires_grad=True)
    weights = [torch.randn(n, 8) for n in (4, 5)]
    out = linears(x, weights, [None] * 2)
    shared, grads = torch.randn(2, 5), torch.randn(3, 2, 4)
    got = torch.vmap(lambda one: torch.autograd.grad(out, x, (one, shared), retain_graph=True)[0])(grads)
    torch.testing.assert_close(got, grads @ weights[0] + shared @ weights[1])


def test_gradients_reach_the_input_alone():
    x = torch.randn(2, 8, requires_grad=True)
    weights = [torch.nn.Parameter(torch.randn(5, 8)) for _ in range(2)]
    first, second = linears(x, weights, [None, None])
    (first.sum() + second.sum() + gated_linear(x, *weights).sum()).backward()
    assert x.grad is not None
    assert all(weight.grad is None for weight in weights)


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="weight"):
        linears(x, [torch.zeros(4, 7)], [None])
    with pytest.raises(ValueError, match="bias"):
        linears(x, [torch.zeros(4, 8)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="up"):
        gated_linear(x, torch.zeros(4, 8), torch.zeros(5, 8))
