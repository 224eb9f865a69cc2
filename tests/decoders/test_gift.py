"""GIFT: whose words are asked, rows on their own, and a prefill in two parts that changes nothing by itself."""

import pytest
import torch
from PIL import Image

import vlmfix
from tests import families
from tests.families.checkpoints import make_checkpoint
from vlmfix.api import wrap
from vlmfix.decoders import gift
from vlmfix.decoders.gift import GIFT, gaze_shift, normalised, rise
from vlmfix.decoders.words import FILTERS, tokens_in
from vlmfix.errors import Refusal, UsageError

from .running import CHUNKS, OPTIONS, RECENT, gap, generate

SPLIT = "gift(saliency_layers=(2,),layers=(1,2,3))"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", pytest.param("idefics3", marks=RECENT)])
def test_the_question_is_what_the_user_asked(family, tmp_path, monkeypatch):
    """Template tokens are no part of it, and stop words do not count."""
    asked = []
    original = GIFT._question

    def spy(self, context):
        found = original(self, context)
        asked.append((context, found))
        return found

    monkeypatch.setattr(GIFT, "_question", spy)
    vlm = vlmfix.load(make_checkpoint(family, tmp_path), GIFT(), device="cpu")
    pictures = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    vlm.answer(pictures, ["Is there a fork on the table?", "What is red?"], max_new_tokens=2)
    (context, found), tokenizer = asked[0], vlm.processor.tokenizer
    texts = [tokenizer.decode(context.ids[row][found["asked"][row]]).strip() for row in range(2)]
    assert texts == ["Is there a fork on the table?", "What is red?"]
    for row, words in enumerate(("fork table", "red")):
        start = int(found["before"][row]) + 1
        counted = [context.ids[row, start + i] for i, n in enumerate(found["counts"][row].tolist()) if n]
        assert sorted("".join(tokenizer.decode(counted).split())) == sorted(words.replace(" ", ""))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("stop-words", "Is there a man with 2 red bicycles?", ["man", "2", "red", "bicycles"]),
        ("all", "Is it?", ["Is it?"]),
        ("stop-words", "is it?", []),
    ],
)
def test_filters(name, text, words):
    assert [text[a:b] for a, b in FILTERS[name](text)] == words


def test_every_piece_of_a_word_counts():
    assert tokens_in(["Is", " a", " bi", "cycle", " red", "?"], [(5, 12), (13, 16)]) == [0, 0, 1, 1, 1, 0]
    assert tokens_in(["", "red"], [(0, 3)]) == [0, 1]


def test_maps_are_defined_where_the_published_code_divides_by_zero():
    assert torch.equal(normalised(torch.full((5,), 0.3)), torch.zeros(5))
    assert torch.equal(normalised(torch.tensor([0.3])), torch.zeros(1))
    nothing = rise(torch.rand(4, 3, 5), torch.zeros(2))
    assert torch.equal(gaze_shift(nothing, torch.tensor(0)), torch.zeros(5))
    shift = normalised(torch.tensor([0.0, 1.0, 0.5]))
    assert shift.tolist() == [0.0, 1.0, 0.5]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
@pytest.mark.parametrize("recipe", ["gift", SPLIT])
def test_rows_do_not_know_of_each_other(family, recipe):
    tiny = families.build(family)
    batch = generate(tiny, recipe, tiny.inputs(list(tiny.rows)))
    for key, pictures in enumerate(tiny.rows):
        alone = generate(tiny, recipe, tiny.inputs([pictures], keys=[key]))
        for one, two in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(one[key], two[0], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_a_split_prefill_by_itself_changes_nothing(family):
    tiny = families.build(family)
    inputs = tiny.inputs(list(tiny.rows))
    plain = generate(tiny, "greedy", inputs, output_hidden_states=True)
    split = generate(tiny, GIFT(alpha=1e-12, saliency_layers=(2,), layers=(1, 2, 3)), inputs)
    assert gap(plain, split) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", [{"use_cache": False}, {"cache_implementation": "static"}, CHUNKS])
def test_a_split_prefill_in_other_modes(mode):
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    assert gap(generate(tiny, SPLIT, inputs), generate(tiny, SPLIT, inputs, **mode)) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", [{}, CHUNKS])
def test_long_questions_are_read_piece_by_piece(mode, monkeypatch):
    tiny = families.build("llava")
    inputs = tiny.inputs([1, 2], text_length=[90, 40])
    whole = generate(tiny, SPLIT, inputs)
    monkeypatch.setattr(gift, "CHUNK", 8)
    assert gap(whole, generate(tiny, SPLIT, inputs, **mode)) < 2e-5


def test_the_map_is_read_once(monkeypatch):
    tiny = families.build("llava")
    rows = []
    original = GIFT._weights
    monkeypatch.setattr(GIFT, "_weights", lambda self, *args: rows.append(1) or original(self, *args))
    with wrap(tiny.model, None, SPLIT) as vlm:
        vlm.generate(**tiny.inputs([1]), max_new_tokens=4, **OPTIONS)
    assert len(rows) == 1


def test_what_it_cannot_do_is_said():
    tiny = families.build("llava")
    inputs = tiny.inputs([1])
    with pytest.raises(Refusal, match="processor"):
        generate(tiny, GIFT(words="stop-words"), inputs)
    with pytest.raises(UsageError, match="stop-words"):
        generate(tiny, "gift(words=stopwords)", inputs)
    with pytest.raises(Refusal, match="paligemma"):
        generate(families.build("paligemma"), SPLIT, inputs)
    with pytest.raises(Refusal, match="choose one"):
        generate(tiny, "vhr+" + SPLIT, inputs)
