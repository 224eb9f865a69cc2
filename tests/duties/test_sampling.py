"""Sampling: a seeded draw depends on the item alone, transformers' own draw is left as it is."""

import pytest
import torch

import vlmfix

from ..families import SPECS, build
from . import lab
from .table import TABLE

DRAW = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95}


def sampled(family, recipe, rows, keys, **options):
    """[rows x samples, NEW] tokens drawn for the rows with these keys."""
    inputs = lab.under(family).inputs(rows, keys=keys)
    fixed = lab.vlm(family, recipe)
    tokens = fixed.generate(**inputs, max_new_tokens=lab.NEW, ids=[f"item {key}" for key in keys], **DRAW, **options)
    return tokens[:, -lab.NEW :]


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="sampling"))
def test_a_seeded_draw_depends_on_the_item_alone(family, method):
    if not SPECS[family].left_padding:
        pytest.skip(f"left-padded rows of {family} differ from rows alone without us too")
    recipe, rows = TABLE[method].full, build(family).rows
    batch = sampled(family, recipe, rows, (0, 1, 2), seed=3)
    turned = sampled(family, recipe, rows[::-1], (2, 1, 0), seed=3)
    assert torch.equal(batch, turned.flip(0))
    alone = sampled(family, recipe, rows[1:2], (1,), seed=3)
    assert torch.equal(batch[1:2], alone)
    left = lab.fixed(family, recipe, rows).logits > float("-inf")
    if left.sum(-1).max() > 1:  # a method may choose the token itself
        assert not torch.equal(batch, sampled(family, recipe, rows, (0, 1, 2), seed=4))


@pytest.mark.parametrize(("family", "method"), lab.pairs("neutral", capability="sampling", main=("llava",)))
def test_several_samples_of_an_item_are_its_own_draws(family, method):
    if not build(family).beams:
        pytest.skip(f"{family}: several return sequences fail in transformers itself")
    recipe = TABLE[method].full
    two = sampled(family, recipe, (1, 1), (0, 1), seed=5, num_return_sequences=2)
    one = sampled(family, recipe, (1, 1), (0, 1), seed=5)
    assert torch.equal(two[::2], one)
    if (lab.fixed(family, recipe, (1, 1)).logits > float("-inf")).sum(-1).max() > 1:
        assert not torch.equal(two[1::2], one)


@pytest.mark.parametrize(("family", "method"), lab.pairs("whisper", capability="sampling"))
def test_transformers_own_draw_is_untouched(family, method):
    rows = build(family).rows
    plain, inputs = build(family).model, build(family).inputs(rows)
    torch.manual_seed(11)
    want = plain.generate(**inputs, max_new_tokens=lab.NEW, do_sample=True, top_k=0)
    torch.manual_seed(11)
    got = lab.vlm(family, TABLE[method].whisper).generate(**inputs, max_new_tokens=lab.NEW, do_sample=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", [name for name in lab.METHODS if name in ("greedy", "var", "vcd")])
def test_settings_in_a_generation_config_count_like_keywords(method):
    from transformers import GenerationConfig

    recipe, inputs = TABLE[method].full, lab.under("llava").inputs((1, 1))
    want = sampled("llava", recipe, (1, 1), (0, 1), seed=3)
    config = GenerationConfig(max_new_tokens=lab.NEW, pad_token_id=0, **DRAW)
    fixed = lab.vlm("llava", recipe)
    got = fixed.generate(**inputs, generation_config=config, seed=3, ids=["item 0", "item 1"])
    assert torch.equal(got[:, -lab.NEW :], want)


def test_a_seeded_draw_reports_the_warped_scores():
    fixed, inputs = lab.vlm("llava", TABLE["vcd"].full), lab.under("llava").inputs((1,))
    options = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    out = fixed.generate(**inputs, seed=1, do_sample=True, temperature=2.0, top_k=5, **options)
    raw = lab.fixed("llava", TABLE["vcd"].full, (1,)).logits[0]
    assert (out.scores[0] > float("-inf")).sum() == 5
    best = out.scores[0] > float("-inf")
    assert lab.difference(out.scores[0][best], raw[best] / 2.0) == 0


def test_seeds_do_not_go_with_beams():
    inputs = lab.under("llava").inputs((1,))
    with pytest.raises(vlmfix.VlmfixError, match="num_beams"):
        lab.vlm("llava", "vcd").generate(**inputs, seed=1, do_sample=True, num_beams=2)


@pytest.mark.parametrize("name", ["typical_p", "epsilon_cutoff", "eta_cutoff"])
def test_seeds_do_not_go_with_truncations_the_draw_does_not_know(name):
    inputs = lab.under("llava").inputs((1,))
    with pytest.raises(vlmfix.VlmfixError, match=f"leave {name} or the seed out"):
        lab.vlm("llava", "vcd").generate(**inputs, seed=1, do_sample=True, **{name: 0.3})


def test_ids_must_name_every_row():
    inputs = lab.under("llava").inputs((1, 1))
    with pytest.raises(vlmfix.VlmfixError, match="ids= names 1 samples, the batch has 2"):
        lab.vlm("llava", "vcd").generate(**inputs, seed=1, do_sample=True, ids=["one"])
