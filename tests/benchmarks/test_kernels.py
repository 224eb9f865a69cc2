"""Cases of the kernels' benchmark, on a CPU: their checks and what is tried, not their times."""

from functools import partial

import pytest
import torch

from benchmarks import kernel_cases, kernel_operations, kernel_sweep
from benchmarks.kernel_linears import GRADIENTS, LINEARS, gradient_case, linear_case


@pytest.fixture
def on_cpu(monkeypatch):
    for module in (kernel_cases, kernel_operations):
        monkeypatch.setattr(module, "DEVICE", "cpu")


def test_flex_attention_is_compiled_in_every_case(on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for keys in (8, 16, 24, 32):
        x = kernel_cases.attention_inputs(1, 2, 2, 1, keys, 16, "sinks")
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            out = kernel_cases.flex(x, causal=False)(x)
        plain = torch.nn.functional.scaled_dot_product_attention(x["q"], x["k"], x["v"])
        torch.testing.assert_close(out, plain, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("case", [
    linear_case("three", 2, 64, (48, 16, 16), biased=True),
    linear_case("gated", 1, 64, (48, 48), gated=True),
    gradient_case("gated", 5, 64, (48, 48)),
    kernel_operations.rotary_case(2, 3),
], ids=lambda case: case.name)  # fmt: skip
def test_a_case_checks_what_it_times(case, on_cpu):
    x = case.inputs()
    with torch.no_grad():
        assert case.check(x) <= 1
        for ours, torchs in zip(case.ours(x), case.baselines["torch"](x)(x), strict=True):
            assert ours.shape == torchs.shape


def test_weights_of_thin_products_do_not_stay_in_the_cache():
    assert len(LINEARS) == 40
    assert all(case.sets * case.bytes > 200e6 for case in [*LINEARS, *GRADIENTS])


def test_choices_of_thin_products_fit_the_kernel():
    own, *few = kernel_sweep.thin(2)
    assert own == {"own": True}
    assert len(few) == 42
    assert {c["rows"] for c in few} == {16}
    assert {c["rows"] for c in kernel_sweep.thin(17)[1:]} == {32}
    assert all(1024 <= c["block_n"] * c["block_k"] <= 8192 for c in few)
    names = [name for name in kernel_sweep.CHOICES if "linear " in name]
    assert names == [case.name for case in LINEARS]


def test_a_choice_is_what_the_kernel_launches_with():
    linear = pytest.importorskip("vlmfix.kernels.linear.triton", exc_type=ImportError)
    own = linear.launch
    config = {"rows": 16, "block_n": 32, "block_k": 64, "warps": 2, "stages": 3}
    with kernel_sweep.chosen(config):
        assert linear.launch("any", "arguments") == linear.Launch(**config)
    with kernel_sweep.chosen({"own": True}):
        assert linear.launch is own


def test_the_best_choices_are_reported():
    rows = [{"own": True, "us": 9.0}, {"us": None, "failed": "no"}, {"us": None, "failed": "nor this"}]
    rows += [{"block_n": n, "us": float(n)} for n in (30, 20, 10, 8, 7, 6, 5, 4, 3, 40)]
    found = kernel_sweep.reported(rows)
    assert [row["us"] for row in found] == [3, 4, 5, 6, 7, 9, None]
    assert found[-1] == {"us": None, "failed": "no", "failures_like_this": 2}
    few = rows[1 : 1 + kernel_sweep.MANY]
    assert len(kernel_sweep.reported(few)) == len(few)
