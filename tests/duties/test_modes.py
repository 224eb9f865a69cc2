"""Every way of generating gives what the same recipe gives in the simplest way."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vlmfix

from ..families import SPECS, build
from ..families.checkpoints import make_tokenizer
from . import lab
from .table import TABLE


def needs(family, method, **mode):
    """Skips where transformers itself cannot, or the method says it cannot."""
    tiny = build(family)
    if "num_beams" in mode and not tiny.beams:
        pytest.skip(f"{family}: beams fail in transformers itself")
    if mode.get("cache_implementation") == "static" and not tiny.static:
        pytest.skip(f"{family}: a static cache fails in transformers itself")
    if mode.get("use_cache") is False and not tiny.spec.cached:
        pytest.skip(f"{family}: the prompt sees what follows, so decoding without a cache differs by itself")
    if mode.get("use_cache") is False and lab.under(family).model.config.model_type in ("instructblip", "blip-2"):
        pytest.skip(f"{family}: generate loses the pictures without a cache, in transformers itself")


def unless_refused(setting, family, method, rows, **mode):
    """A run in a mode; skips where the method refuses it and names the setting to change."""
    try:
        return lab.fixed(family, TABLE[method].full, rows, **mode)
    except vlmfix.Refusal as refusal:
        if setting not in str(refusal):
            pytest.fail(f"{method} refuses without naming {setting}: {refusal}")
        pytest.skip(f"{method} refuses: {refusal}")


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_without_a_cache(family, method):
    needs(family, method, use_cache=False)
    if not getattr(lab.vlm(family, TABLE[method].full).recipe.methods[0], "same_uncached", True):
        pytest.skip(f"{method}: a step changes what older rows see")
    rows = build(family).rows
    uncached = unless_refused("use_cache", family, method, rows, use_cache=False)
    lab.assert_same(uncached, lab.fixed(family, TABLE[method].full, rows))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_with_a_static_cache(family, method):
    needs(family, method, cache_implementation="static")
    rows = build(family).rows
    static = unless_refused("cache_implementation", family, method, rows, cache_implementation="static")
    lab.assert_same(static, lab.fixed(family, TABLE[method].full, rows))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams"))
def test_beams_equal_beams_without_a_cache(family, method):
    needs(family, method, num_beams=3, use_cache=False)
    if not getattr(lab.vlm(family, TABLE[method].full).recipe.methods[0], "same_uncached", True):
        pytest.skip(f"{method}: a step changes what older rows see")
    rows = (1, 1)
    uncached = unless_refused("use_cache", family, method, rows, num_beams=3, use_cache=False)
    cached = lab.fixed(family, TABLE[method].full, rows, num_beams=3)
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.beams, uncached.beams, atol=lab.LOGITS, rtol=0)
    assert not torch.equal(cached.beams, lab.plain(family, rows, num_beams=3).beams)


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams"))
def test_return_sequences_are_the_best_beams(family, method):
    needs(family, method, num_beams=3)
    best = lab.fixed(family, TABLE[method].full, (1, 1), num_beams=3)
    three = lab.fixed(family, TABLE[method].full, (1, 1), num_beams=3, num_return_sequences=3)
    assert three.tokens.shape[0] == 6
    assert torch.equal(three.tokens[::3], best.tokens)
    assert (three.beams.view(2, 3).diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams"))
def test_beams_of_a_padded_batch_equal_its_rows_alone(family, method):
    needs(family, method, num_beams=2)
    rows = build(family).rows
    if not SPECS[family].left_padding:
        pytest.skip(f"left-padded rows of {family} differ from rows alone without us too")
    batch = lab.fixed(family, TABLE[method].full, rows, num_beams=2)
    for i, pictures in enumerate(rows):
        alone = lab.fixed(family, TABLE[method].full, (pictures,), key=i, num_beams=2)
        torch.testing.assert_close(batch.beams[i], alone.beams[0], atol=5e-5, rtol=0)
        assert torch.equal(batch.tokens[i], alone.tokens[0])


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_a_prefill_in_chunks(family, method):
    rows = build(family).rows
    chunks = unless_refused("prefill_chunk_size", family, method, rows, prefill_chunk_size=7)
    lab.assert_same(chunks, lab.fixed(family, TABLE[method].full, rows))


class Notes(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.append(value.reshape(-1).clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="streaming"))
def test_a_streamer_sees_what_is_returned(family, method):
    notes = Notes()
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs((1,))
    tokens = fixed.generate(**inputs, max_new_tokens=lab.NEW, streamer=notes)
    assert notes.ended
    assert torch.equal(torch.cat(notes.ids)[-lab.NEW :], tokens[0, -lab.NEW :])
    assert [len(ids) for ids in notes.ids[1:]] == [1] * lab.NEW


class AfterTwo(StoppingCriteria):
    def __init__(self):
        self.shapes = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return torch.full((len(input_ids),), len(self.shapes) == 2)


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="greedy"))
def test_stopping_criteria_see_visible_rows(family, method):
    rows, stop = build(family).rows, AfterTwo()
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs(rows)
    tokens = fixed.generate(**inputs, max_new_tokens=lab.NEW, stopping_criteria=StoppingCriteriaList([stop]))
    assert [shape[0] for shape in stop.shapes] == [len(rows)] * 2
    assert torch.equal(tokens[:, -2:], lab.fixed(family, TABLE[method].full, rows).tokens[:, :2])


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="greedy"))
def test_stop_strings(family, method):
    whole = lab.fixed(family, TABLE[method].full, (1,), max_new_tokens=24).tokens[0].tolist()
    tokenizer = make_tokenizer([])
    texts = [tokenizer.decode([token]) for token in whole]
    at = next(i for i, text in enumerate(texts) if i > 0 and text.isascii() and text not in texts[:i])
    expected = next(i for i in range(len(whole)) if texts[at] in tokenizer.decode(whole[: i + 1])) + 1
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs((1,))
    options = {"stop_strings": [texts[at]], "tokenizer": tokenizer, "return_dict_in_generate": True}
    out = fixed.generate(**inputs, max_new_tokens=24, output_logits=True, **options)
    assert len(out.logits) == expected
    assert out.sequences[0, -expected:].tolist() == whole[:expected]


class Favour(LogitsProcessor):
    """Adds to one token so much that it wins, and notes what it was given."""

    def __init__(self, token):
        self.token, self.given = token, []

    def __call__(self, input_ids, scores):
        self.given.append(scores.clone())
        return scores.index_fill(1, torch.tensor([self.token]), 1e4)


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="greedy"))
def test_processors_and_scores_see_the_recipe(family, method):
    rows, favour = build(family).rows, Favour(77)
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs(rows)
    out = fixed.generate(
        **inputs,
        max_new_tokens=2,
        logits_processor=LogitsProcessorList([favour]),
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = lab.fixed(family, TABLE[method].full, rows)
    assert (out.sequences[:, -2:] == 77).all()
    assert lab.difference(favour.given[0], want.logits[0]) == 0
    assert torch.equal(out.logits[0], favour.given[0])
    assert out.scores[0].shape == out.logits[0].shape
    assert (out.scores[0][:, 77] == 1e4).all()


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="greedy"))
def test_hidden_states_are_those_of_visible_rows(family, method):
    rows = build(family).rows
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs(rows)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    out = fixed.generate(**inputs, **options)
    plain = build(family).model.generate(**inputs, do_sample=False, **options)
    for step, want in zip(out.hidden_states, plain.hidden_states, strict=True):
        for states, expected in zip(step, want, strict=True):
            assert states.shape[0] == expected.shape[0] == len(rows)
    prompt = out.hidden_states[0][0]
    torch.testing.assert_close(prompt[:, -1], plain.hidden_states[0][0][:, -1], atol=1e-5, rtol=0)
