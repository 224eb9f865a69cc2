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

    def choose(probs, saliency, tau, draws, uniforms):
        choice = original(probs, saliency, tau, draws, uniforms)
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
def test_candidates_come_by_probability(saliency, chosen):
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]])  # a tie, as between underflown probabilities
    table = torch.tensor([saliency, saliency])
    choice = sgrs.choose(probs, table, torch.tensor([0.5, 0.5]), 3, None)
    assert choice.tolist() == [chosen, chosen]
