"""Contrast and choice: hand-checked numbers, then the kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import launching, within_budget
from vlmfix.kernels.contrast import choose, contrast, contrast_and_choose
from vlmfix.kernels.dispatch import has_triton, reference_only

if has_triton():
    from vlmfix.kernels.contrast import triton_choose

X, Y = torch.tensor([[2.0, 1.5, 0.5, -1.0]]), torch.tensor([[[2.2, 0.9, 0.4, -2.0]]])
NEVER = float("-inf")


def test_hand_checked():
    """Worked by hand for (1 + w) x - w y, and the entropy-weighted form of arXiv 2408.04664."""
    one = torch.ones(1, 1)
    for beta, want in ((0.1, [1.8, 2.1, 0.6, NEVER]), (0.3, [1.8, 2.1, NEVER, NEVER])):
        torch.testing.assert_close(contrast(X, Y, one, beta=torch.tensor([beta])), torch.tensor([want]))
    got = contrast(X, Y, 2 * one, beta=torch.tensor([0.1]), entropy_floor=1e-2, normalise=True)
    torch.testing.assert_close(got, torch.tensor([[-1.66738, -0.31879, -2.47416, NEVER]]), atol=2e-5, rtol=0)
    largest = X.softmax(-1).max()
    for gate, want in ((largest + 0.01, 2 * X - Y[0]), (largest - 0.01, X)):
        torch.testing.assert_close(contrast(X, Y, one, gate=gate[None]), want)
    torch.testing.assert_close(contrast(X, Y, one, base=torch.ones(1)), X - Y[0])


def test_choice_by_hand():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draws = {0.0: 0, 0.49: 0, 0.51: 1, 0.79: 1, 0.81: 2, 0.94: 2, 0.96: 3}
    for u, token in draws.items():
        assert choose(scores, u=torch.tensor([u])).item() == token
    for u, token in {0.6: 0, 0.63: 1, 0.99: 1}.items():  # 0.5 and 0.3 remain: the border is 0.625
        assert choose(scores, u=torch.tensor([u]), top_k=torch.tensor([2])).item() == token
        assert choose(scores, u=torch.tensor([u]), top_p=torch.tensor([0.6])).item() == token
    assert choose(scores).item() == 0
    assert choose(scores, u=torch.tensor([0.99]), top_p=torch.tensor([1e-9])).item() == 0


def logits(place, batch=3, branches=2):
    n = place(150, 32003)
    x, y = 3 * place.randn(batch, n), 3 * place.randn(branches, batch, n)
    x[0, 3], y[0, 1, 7] = NEVER, NEVER
    return x, y, place.rand(batch, branches)


@pytest.mark.parametrize("name", ["plain", "beta", "gate", "entropy", "base", "normalise"])
def test_scores(place, name):
    x, y, weight = logits(place)
    beta = place.tensor([0.1, 0.0, 0.3])
    kw = {
        "plain": {},
        "beta": {"beta": beta},
        "gate": {"beta": beta, "gate": place.tensor([2.0, 1e-6, 2.0])},
        "entropy": {"entropy_floor": 1e-2},
        "base": {"base": place.tensor([0.5, 1.0, 2.0])},
        "normalise": {"beta": beta, "normalise": True},
    }[name]
    exact = contrast(x.double(), y.double(), weight.double(), **kw)
    with reference_only():
        plain = contrast(x, y, weight, **kw)
    with launching("contrast"):
        actual = contrast(x, y, weight, **kw)
    within_budget(actual, plain, exact, torch.float32)


@pytest.mark.parametrize("few", [None, 2, 256])
@pytest.mark.parametrize("name", ["greedy", "temperature", "top_k", "top_p", "all"])
def test_tokens(place, monkeypatch, name, few):
    """`few`: how many candidates are settled directly; with 2 the thresholds are searched."""
    if few is not None and name in ("top_k", "top_p", "all"):
        monkeypatch.setattr(triton_choose, "FEW", few)
        monkeypatch.setattr(triton_choose, "NEAR", 4.0 if place.device == "cuda" else 100.0)
    x, y, weight = logits(place)
    beta = place.tensor([0.01, 0.0, 0.3])
    heat, top_k, top_p = place.tensor([0.5, 1.0, 2.0]), place.tensor([3, 0, 17]), place.tensor([0.5, 0.9, 1e-6])
    kw = {
        "greedy": {},
        "temperature": {"temperature": heat},
        "top_k": {"top_k": top_k},
        "top_p": {"top_p": top_p},
        "all": {"temperature": heat, "top_k": top_k, "top_p": top_p},
    }[name]
    for _ in range(1 if name == "greedy" else place(1, 50)):
        if name != "greedy":
            kw["u"] = place.rand(3)
        with reference_only():
            want, scores = contrast_and_choose(x.double(), y.double(), weight.double(), beta=beta, **kw)
        with launching("contrast", "choose"):
            got, _ = contrast_and_choose(x, y, weight, beta=beta, **kw)
            alone = choose(scores.float(), **kw)
        sure = _margin(scores, want, kw) > 1e-5
        assert torch.equal(torch.where(sure, got, want), want)
        assert torch.equal(torch.where(sure, alone, want), want)


def _margin(scores, token, kw):
    """Distance of each draw from the next token, as a share of the mass; rows close to it are not compared."""
    if "u" not in kw:
        ranked = scores.topk(2).values
        return ranked[:, 0] - ranked[:, 1]
    near = torch.full_like(kw["u"], 1.0)
    for shift in (-2e-5, 2e-5):
        with reference_only():
            moved = choose(scores, **kw | {"u": (kw["u"] + shift).clamp(0, 1 - 1e-7)})
        near = torch.where(moved == token, near, 0.0)
    return near


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="branches"):
        contrast(X, X, torch.ones(1, 1))
    with pytest.raises(ValueError, match="weight"):
        contrast(X, Y, torch.ones(2, 1))
