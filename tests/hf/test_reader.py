"""A text-only language model that reads along with LCD."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vlmfix
from vlmfix.api import wrap
from vlmfix.decoders.lcd import LCD
from vlmfix.errors import UsageError
from vlmfix.hf import reader
from vlmfix.hf.reader import Reader, TextModel

from ..families import build
from ..families.core import DECODER

VOCABULARY = {f"t{i}": i for i in range(256)}
OPTIONS = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}


def language_model(seed=0, **over):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**DECODER, **over})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return TextModel("tiny", model, VOCABULARY)


@pytest.fixture
def text(monkeypatch):
    found = language_model()
    monkeypatch.setattr(reader, "load", lambda name: found)
    return found


class Rendering:
    def __init__(self, vocabulary):
        self._vocabulary = vocabulary

    def vocabulary(self):
        return self._vocabulary


@pytest.fixture
def lcd(text, monkeypatch):
    """LCD that needs no processor: ids mean the same in both tiny models."""
    monkeypatch.setattr(LCD, "resolve", lambda self, facts: self)
    return LCD(alpha=0.3, beta=0, lm="tiny")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "instructblip"])
def test_scores_are_those_of_the_text_read_anew(family, text, lcd):
    tiny = build(family, fresh=True)
    rows = (1, 1)
    inputs = tiny.inputs(rows)
    with wrap(tiny.model, None, lcd) as vlm:
        out = vlm.generate(**inputs, **OPTIONS)
        assert vlm.report["branches"] == 0
    tokens = out.sequences[:, -4:]
    for row in range(len(rows)):
        visual = tiny.expected_visual(inputs)[row]
        frames = torch.isin(inputs["input_ids"][row], torch.tensor(vlm.parts.structure_ids, dtype=torch.long))
        words = inputs["input_ids"][row][inputs["attention_mask"][row].bool() & ~visual & ~frames]
        for i in range(4):
            with torch.no_grad():
                read = torch.cat([words, tokens[row, :i]])[None]
                other = text.model(read).logits[0, -1].log_softmax(-1)
                own = _next(tiny, inputs, row, tokens[row, :i]).log_softmax(-1)
            weight = 0.3 / -(other.exp() * other).sum()
            want = ((1 + weight) * own - weight * other).log_softmax(-1)
            torch.testing.assert_close(out.logits[i][row], want, atol=3e-5, rtol=0)


def _next(tiny, inputs, row, tokens):
    """Plain logits of the model after forced tokens."""
    forced = tokens.tolist()
    out = tiny.model.generate(
        **inputs,
        max_new_tokens=len(forced) + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[_Force(forced)],
    )
    return out.logits[-1][row]


class _Force:
    def __init__(self, tokens):
        self.tokens = list(tokens)

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.tokens.pop(0)]), 1e9) if self.tokens else scores


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_its_cache_follows_beams(options, lcd):
    tiny = build("llava", fresh=True)
    inputs = tiny.inputs((1, 0, 1))
    with wrap(tiny.model, None, lcd) as vlm:
        cached = vlm.generate(**inputs, max_new_tokens=6, **options)
        assert torch.equal(cached, vlm.generate(**inputs, max_new_tokens=6, use_cache=False, **options))
    assert not torch.equal(cached, tiny.model.generate(**inputs, max_new_tokens=6, do_sample=False, **options))


def test_a_padded_batch_equals_its_rows_alone(lcd):
    tiny = build("llava", fresh=True)
    with wrap(tiny.model, None, lcd) as vlm:
        batch = vlm.generate(**tiny.inputs((2, 1)), **OPTIONS)
        for i, pictures in enumerate((2, 1)):
            alone = vlm.generate(**tiny.inputs([pictures], keys=[i]), **OPTIONS)
            for a, b in zip(batch.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[i], b[0], atol=2e-5, rtol=0)


def test_vocabularies_must_agree(text):
    longer = {**VOCABULARY, "<image>": 256}
    text.check(longer)
    with pytest.raises(vlmfix.Refusal, match="tiny: token 7 is 't7' there and 'other' in this model"):
        text.check({**{k: i for k, i in longer.items() if i != 7}, "other": 7})
    with pytest.raises(vlmfix.Refusal, match="needs the processor to compare vocabularies"):
        LCD(lm="tiny").resolve(SimpleNamespace(rendering=None))
    assert LCD(lm="tiny").resolve(SimpleNamespace(rendering=Rendering(VOCABULARY))).reads()[0] is text


def test_a_token_it_cannot_read_is_named():
    with pytest.raises(vlmfix.Refusal, match="tiny has 256 tokens and cannot read token 300 of the prompt"):
        Reader(language_model(), [[5, 300]], torch.device("cpu"))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="could not be loaded as a language model"):
        reader.load(str(tmp_path))
