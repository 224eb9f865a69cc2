"""The seeded draw: uniforms that depend on (seed, item, sample, step) alone, and the inverse of the distribution."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from vlmfix.hf.draw import BLOCK, SeededDraw, inverse_cdf, row_key, uniforms


def keys(*items):
    return np.array([row_key(0, item, 0) for item in items], dtype=np.uint64)


def test_uniforms_are_the_same_in_every_batch_and_block():
    whole = uniforms(keys("a", "b", "c"), 0, 100)
    assert whole.dtype == np.float32
    assert np.array_equal(uniforms(keys("c", "a"), 0, 100), whole[[2, 0]])
    assert np.array_equal(uniforms(keys("b"), 40, 20)[0], whole[1, 40:60])
    assert ((whole >= 0) & (whole < 1)).all()


def test_uniforms_do_not_change_between_releases():
    """Answers of old runs can be made again."""
    got = uniforms(np.array([row_key(7, "item 3", 1)], dtype=np.uint64), 0, 3)[0]
    assert got.tolist() == [0.8196678757667542, 0.7690151333808899, 0.902470588684082]


def test_uniforms_are_uniform_and_independent():
    u = uniforms(keys(*map(str, range(200))), 0, 200).ravel()
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert abs(counts - 2000).max() < 5 * 2000**0.5
    table = u.reshape(200, 200)
    for a, b in ((table[:, :-1], table[:, 1:]), (table[:-1], table[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_keys_tell_seed_item_and_sample_apart():
    made = {row_key(seed, item, sample) for seed in (0, 1) for item in ("a", "b", "a1") for sample in (0, 1)}
    assert len(made) == 12
    assert row_key(1, "2", 3) != row_key(12, "", 3)


def test_the_inverse_cdf_follows_the_distribution():
    p = torch.tensor([0.1, 0.0, 0.25, 0.6, 0.05])
    u = torch.linspace(0, 1, 20_001)[:-1]
    drawn = inverse_cdf(p.log().expand(len(u), -1), u)
    assert drawn.bincount(minlength=5).float().div(len(u)).tolist() == pytest.approx(p.tolist(), abs=1e-3)
    assert (drawn.diff() >= 0).all()


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_tokens_that_are_ruled_out_are_never_drawn(u):
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf], [0.0, *[-torch.inf] * 4]])
    drawn = inverse_cdf(scores, torch.full((2,), u))
    assert drawn[0] in (1, 3)
    assert drawn[1] == 0


def test_the_processor_leaves_the_drawn_token_of_each_step():
    draw = SeededDraw(0, ["a", "b"], 2, LogitsProcessorList([TemperatureLogitsWarper(0.5)]), keep_scores=True)
    scores = torch.randn(4, 11, generator=torch.Generator().manual_seed(0))
    u = uniforms(np.array([row_key(0, item, s) for item in "ab" for s in (0, 1)], dtype=np.uint64), 0, BLOCK + 2)
    for step in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1):
        out = draw(torch.zeros(4, 3 + step, dtype=torch.long), scores)
        want = inverse_cdf(scores / 0.5, torch.from_numpy(u[:, step]))
        assert (out == 0).sum(1).tolist() == [1] * 4
        assert torch.equal(out.argmax(1), want)
        assert torch.isneginf(out).sum() == 4 * 10
    assert torch.equal(draw.scores[0], scores / 0.5)
    assert len(draw.scores) == 5
