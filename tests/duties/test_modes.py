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


def needs(family, rows, **mode):
    """Skips where transformers itself cannot do it, or by itself gives something else than the simplest way."""
    simple = {k: v for k, v in mode.items() if k == "num_beams"}
    try:
        plain = lab.plain(family, rows, **mode)
        lab.assert_same(plain, lab.plain(family, rows, **simple))
    except AssertionError as difference:
        pytest.skip(f"{family} without any recipe: {difference}")
    except Exception as error:
        pytest.skip(f"{family} without any recipe: {type(error).__name__}: {error}")


LATE = {"avisc", "iava", "agla"}
REFUSES = {
    "use_cache": {"vasparse_attention", "sgrs", "opera", *LATE},
    "cache_implementation": {"sgrs", "opera", *LATE},
    "prefill_chunk_size": {
        *("fia", "vhr", "vhr_local", "vcd", "m3id", "icd", "lcd", "pai_guidance", "sid", "ritual", "sgrs", *LATE),
    },
}
"""What may be refused on the main families; any other refusal there is a failure, not a skip."""


def unless_refused(setting, family, method, rows, **mode):
    """A run in a mode; skips where the method is known to refuse it, and names the setting to change."""
    try:
        return lab.fixed(family, TABLE[method].full, rows, **mode)
    except vlmfix.Refusal as refusal:
        if setting not in str(refusal):
            pytest.fail(f"{method} refuses without naming {setting}: {refusal}")
        if family in lab.MAIN and method not in REFUSES[setting]:
            pytest.fail(f"{method} did not refuse this before: {refusal}")
        pytest.skip(f"{method} refuses: {refusal}")


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_without_a_cache(family, method):
    needs(family, build(family).rows, use_cache=False)
    if not getattr(lab.vlm(family, TABLE[method].full).recipe.methods[0], "same_uncached", True):
        pytest.skip(f"{method}: a step changes what older rows see")
    rows = build(family).rows
    uncached = unless_refused("use_cache", family, method, rows, use_cache=False)
    lab.assert_same(uncached, lab.fixed(family, TABLE[method].full, rows), lab.ROUGH.get(family, lab.LOGITS))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_with_a_static_cache(family, method):
    needs(family, build(family).rows, cache_implementation="static")
    rows = build(family).rows
    static = unless_refused("cache_implementation", family, method, rows, cache_implementation="static")
    lab.assert_same(static, lab.fixed(family, TABLE[method].full, rows))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams"))
def test_beams_equal_beams_without_a_cache(family, method):
    needs(family, (1, 1), num_beams=3, use_cache=False)
    if not getattr(lab.vlm(family, TABLE[method].full).recipe.methods[0], "same_uncached", True):
        pytest.skip(f"{method}: a step changes what older rows see")
    rows = (1, 1)
    uncached = unless_refused("use_cache", family, method, rows, num_beams=3, use_cache=False)
    cached = lab.fixed(family, TABLE[method].full, rows, num_beams=3)
    assert torch.equal(cached.tokens, uncached.tokens)
    torch.testing.assert_close(cached.beams, uncached.beams, atol=lab.LOGITS, rtol=0)
    assert not torch.equal(cached.beams, lab.plain(family, rows, num_beams=3).beams)


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams", main=("llava",)))
def test_return_sequences_are_the_best_beams(family, method):
    needs(family, (1, 1), num_beams=3)
    best = lab.fixed(family, TABLE[method].full, (1, 1), num_beams=3)
    three = lab.fixed(family, TABLE[method].full, (1, 1), num_beams=3, num_return_sequences=3)
    assert three.tokens.shape[0] == 6
    assert torch.equal(three.tokens[::3], best.tokens)
    assert (three.beams.view(2, 3).diff(dim=1) <= 0).all()


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="beams"))
def test_beams_of_a_padded_batch_equal_its_rows_alone(family, method):
    rows = build(family).rows
    needs(family, rows, num_beams=2)
    if not SPECS[family].left_padding:
        pytest.skip(f"left-padded rows of {family} differ from rows alone without us too")
    batch = lab.fixed(family, TABLE[method].full, rows, num_beams=2, max_new_tokens=3)
    for i, pictures in enumerate(rows):
        alone = lab.fixed(family, TABLE[method].full, (pictures,), key=i, num_beams=2, max_new_tokens=3)
        torch.testing.assert_close(batch.beams[i], alone.beams[0], atol=5e-5, rtol=0)
        assert torch.equal(batch.tokens[i], alone.tokens[0])


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_a_prefill_in_chunks(family, method):
    rows = build(family).rows
    needs(family, rows, prefill_chunk_size=7)
    chunks = unless_refused("prefill_chunk_size", family, method, rows, prefill_chunk_size=7)
    lab.assert_same(chunks, lab.fixed(family, TABLE[method].full, rows), lab.ROUGH.get(family, lab.LOGITS))


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


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="greedy", main=("llava",)))
def test_stop_strings(family, method):
    tokenizer = make_tokenizer([])
    whole, at = marked(family, method, tokenizer)
    text = tokenizer.decode(whole[at])
    expected = next(i for i in range(len(whole)) if text in tokenizer.decode(whole[: i + 1])) + 1
    fixed, inputs = lab.vlm(family, TABLE[method].full), lab.under(family).inputs((1,))
    options = {"stop_strings": [text], "tokenizer": tokenizer, "return_dict_in_generate": True}
    out = fixed.generate(**inputs, max_new_tokens=len(whole), output_logits=True, **options)
    assert len(out.logits) == expected
    assert out.sequences[0, -expected:].tolist() == whole[:expected]


def marked(family, method, tokenizer):
    """Generated tokens, and the place of one whose text can stop the next run."""
    for length in (lab.NEW, 12, 24):
        whole = lab.fixed(family, TABLE[method].full, (1,), max_new_tokens=length).tokens[0].tolist()
        texts = [tokenizer.decode(token) for token in whole]
        for at in range(1, length):
            if texts[at].isascii() and texts[at] not in texts[:at]:
                return whole, at
    pytest.skip(f"{method} makes this {family} model generate nothing readable")


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
