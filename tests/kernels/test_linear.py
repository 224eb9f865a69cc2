"""Products of a few rows with weight matrices: the kernels against their definitions."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import launching, within_budget
from vlmfix.kernels import dispatch
from vlmfix.kernels.linear import ROWS, gated_linear, linears, reference

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32])
@pytest.mark.parametrize("sizes", [(48,), (70, 33), (96, 16, 40)], ids=str)
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


def test_what_the_kernels_leave_to_others(place):
    half = torch.float16
    x, many = place.randn(4, 64, dtype=half), place.randn(ROWS + 1, 64, dtype=half)
    four = [place.randn(16, 64, dtype=half) for _ in range(4)]
    before = dispatch.launches.copy()
    linears(x, four, [None] * 4)
    linears(x, four[:2], [None, place.randn(16, dtype=half)])
    linears(many, four[:1], [None])
    linears(x, [place.randn(64, 16, dtype=half).T], [None])
    linears(x.float(), [four[0].float()], [None])
    gated_linear(many, *four[:2])
    assert dispatch.launches == before


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
