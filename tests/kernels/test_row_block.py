"""Row block and column mass: the definition against softmax, the kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import DTYPES, launching, within_budget
from vlmfix.kernels.dispatch import reference_only
from vlmfix.kernels.row_block import column_mass, row_block


def problem(place, heads, n_kv, rows, keys, size, dtype=torch.float32, bias=None):
    """Queries at the end of a left-padded batch, with the log-sum-exp of their visible scores."""
    q, k = place.randn(2, heads, rows, size, dtype=dtype), place.randn(2, n_kv, keys, size, dtype=dtype)
    q_pos, start = place.arange(keys - rows, keys), place.tensor([0, keys // 4])
    full = k.double().repeat_interleave(heads // n_kv, 1)
    z = q.double() @ full.mT * size**-0.5
    z = z if bias is None else z + bias.double()[:, :, None]
    slots = place.arange(keys)
    seen = (slots <= q_pos[:, None]) & (slots >= start[:, None, None])
    z = z.masked_fill(~seen[:, None], float("-inf"))
    return q, k, z.logsumexp(-1), q_pos, start, z.softmax(-1).nan_to_num()


def test_definition_is_the_softmax():
    from tests.kernels.tools import Place

    place = Place("cpu")
    torch.manual_seed(1)
    bias = place.randn(1, 4, 23)
    q, k, lse, q_pos, start, p = problem(place, 4, 2, 5, 23, 16, torch.float64, bias)
    kw = {"q_pos": q_pos, "start": start}
    torch.testing.assert_close(row_block(q, k, lse, 0.25, bias=bias, **kw), p)
    index = torch.tensor([[3, 22, 0], [7, 7, 19]])
    chosen = p.gather(3, index[:, None, None].expand(-1, 4, 5, -1))
    for reduce, want in (("mean", chosen.mean(1)), ("max", chosen.amax(1)), ("sum", chosen.sum(1))):
        torch.testing.assert_close(row_block(q, k, lse, 0.25, reduce, index=index, bias=bias, **kw), want)
    q, k, lse, q_pos, start, p = problem(place, 4, 2, 23, 23, 16, torch.float64)
    weight = torch.rand(2, 23)
    mass = column_mass(q, k, lse, 0.25, "mean", q_pos=q_pos, start=start, weight=weight)
    torch.testing.assert_close(mass, (p * weight[:, None, :, None]).sum(2).mean(1))


@pytest.mark.parametrize("reduce", [None, "mean", "max", "sum"])
@pytest.mark.parametrize(("heads", "n_kv", "rows", "size"), [(3, 3, 1, 16), (6, 2, 5, 80)])
def test_row_block(place, reduce, heads, n_kv, rows, size):
    keys = place(37, 900)
    q, k, lse, q_pos, start, p = problem(place, heads, n_kv, rows, keys, size)
    lse = lse.float()
    lse[0, 0, 0] = float("-inf")  # a row that sees nothing
    p[0, 0, 0] = 0
    index = place.randint(0, keys, (2, 11))
    for wanted in (None, index):
        exact = p if wanted is None else p.gather(3, wanted[:, None, None].expand(-1, heads, rows, -1))
        exact = {None: exact, "mean": exact.mean(1), "max": exact.amax(1), "sum": exact.sum(1)}[reduce]
        with reference_only():
            plain = row_block(q, k, lse, size**-0.5, reduce, index=wanted, q_pos=q_pos, start=start)
        with launching("row_block"):
            actual = row_block(q, k, lse, size**-0.5, reduce, index=wanted, q_pos=q_pos, start=start)
        within_budget(actual, plain, exact, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_biases_and_element_types(place, dtype):
    bias = place.randn(1, 1, 50)
    q, k, lse, _, _, p = problem(place, 4, 2, 7, 50, 32, dtype, bias)
    slots = place.arange(50)
    mask = (slots <= place.arange(43, 50)[:, None]) & (slots >= place.tensor([0, 12])[:, None, None])
    lse = lse.float()
    with reference_only():
        plain = row_block(q, k, lse, 32**-0.5, "max", mask=mask, bias=bias)
    with launching("row_block"):
        actual = row_block(q, k, lse, 32**-0.5, "max", mask=mask, bias=bias)
    within_budget(actual, plain, p.amax(1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_mass(place, dtype):
    queries = place(33, 517)
    q, k, lse, q_pos, start, p = problem(place, 4, 2, queries, queries, 32, dtype)
    lse, weight = lse.float(), place.rand(2, queries)
    exact = p.sum(2)
    for factor, reduce in ((None, None), (weight, "mean")):
        want = exact if factor is None else (p * weight.double()[:, None, :, None]).sum(2).mean(1)
        with reference_only():
            plain = column_mass(q, k, lse, 32**-0.5, reduce, q_pos=q_pos, start=start, weight=factor)
        with launching("column_mass"):
            actual = column_mass(q, k, lse, 32**-0.5, reduce, q_pos=q_pos, start=start, weight=factor)
        within_budget(actual, plain, want, torch.float32)


def test_wrong_shapes_are_named():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="divisible"):
        row_block(q, torch.zeros(1, 3, 5, 8), torch.zeros(1, 4, 2), 1.0)
    with pytest.raises(ValueError, match="lse"):
        column_mass(q, torch.zeros(1, 2, 5, 8), torch.zeros(1, 4, 3), 1.0)
    with pytest.raises(ValueError, match="median"):
        row_block(q, torch.zeros(1, 2, 5, 8), torch.zeros(1, 4, 2), 1.0, "median")
