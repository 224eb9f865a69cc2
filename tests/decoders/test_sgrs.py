"""What SGRS remembers of the saliencies it has committed."""

import pytest
import torch

from vlmfix.decoders import sgrs
from vlmfix.method import Step


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_the_threshold_is_a_share_of_the_mean_of_the_last_committed(window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    taus, committed = [], [torch.zeros(0, 2)]
    original = sgrs.choose

    def choose(saliency, tau, draws):
        choice = original(saliency, tau, draws)
        taus.append(tau)
        committed.append(saliency.gather(1, choice[:, None]).T)
        return choice

    monkeypatch.setattr(sgrs, "choose", choose)
    method, notes = sgrs.SGRS(alpha=0.7, top_k=3, window=window), {}
    for number in range(1, 8):
        before = torch.cat(committed)[-window:]
        table = torch.rand(2, 3, generator=generator)
        saliency = None if number == 1 else lambda tokens, table=table: table
        logits = torch.randn(2, 11, generator=generator)
        method.scores(logits, Step(number, (), (), None, notes, saliency))
        if number > 1:
            expected = 0.7 * before.mean(0) if len(before) else torch.zeros(2)
            torch.testing.assert_close(taus[-1], expected)
    assert len(taus) == 6
    assert notes["history"].shape == (2, max(window, 1))


@pytest.mark.parametrize(
    ("saliency", "chosen"),
    [
        ([0.5, 0.9, 0.9, 1.0], 0),
        ([0.4, 0.6, 0.9, 1.0], 1),
        ([0.4, 0.1, 0.5, 1.0], 2),
        ([0.4, 0.1, 0.2, 1.0], 3),
        ([0.4, 0.1, 0.2, 0.3], 0),
    ],
)
def test_the_first_that_passes_else_the_most_salient(saliency, chosen):
    table = torch.tensor([saliency, [0.9, 0.0, 0.0, 0.0]])
    assert sgrs.choose(table, torch.tensor([0.5, 0.5]), 3).tolist() == [chosen, 0]


@pytest.mark.parametrize(
    ("probs", "uniforms", "order"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0.95, 0.3, 0.9], [3, 0, 2, 1]),
        ([0.4, 0.3, 0.2, 0.1], [0.3, 0.3], [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0, 1, 2, 3]),
    ],
)
def test_draws_are_without_replacement(probs, uniforms, order):
    """Also where nothing but underflowed probabilities is left; those not drawn follow by probability."""
    one, other = torch.tensor([probs, [0.1, 0.2, 0.3, 0.4]]), torch.tensor([uniforms, [0.2] * len(uniforms)])
    assert sgrs.drawn(one, other)[0].tolist() == order


def test_of_equally_salient_candidates_the_first_drawn_is_taken(monkeypatch):
    """When none passes; here the third is drawn."""
    monkeypatch.setattr(Step, "uniforms", lambda self, seed, count, rows: torch.full((rows, count), 0.9))
    history = torch.tensor([[float("nan"), 1.0]])
    step = Step(2, (), (), None, {"history": history}, lambda tokens: torch.zeros(tokens.shape))
    method = sgrs.SGRS(top_k=4, draws=1, window=2, draw="sample")
    scores = method.scores(torch.tensor([[3.0, 2.5, 2.2, 1.0]]), step)
    assert scores.isfinite().tolist() == [[False, False, True, False]]
