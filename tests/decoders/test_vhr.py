"""VHR: the packed prompt without pictures is the prompt without pictures, and leaves no trace."""

import pytest
import torch

from tests import families
from vlmfix.api import wrap
from vlmfix.attention.compiled import Compiled
from vlmfix.decoders.vhr import VHR, Reinforce
from vlmfix.errors import Refusal, UsageError
from vlmfix.hf.hooks import installed

from .running import OPTIONS, gap, generate

WEAK = "vhr(alpha=1.0000001,layers=(0.0,1.0))"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3", "aya_vision"])
def test_blind_heads_are_those_of_the_prompt_without_pictures(family, monkeypatch):
    """Head outputs that the rule compares equal those of two separate runs of the untouched model."""
    tiny = families.build(family, fresh=True)
    inputs = tiny.inputs([1], keys=[1])
    pairs = []
    original = Reinforce.__call__
    monkeypatch.setattr(Reinforce, "__call__", lambda self, *pair: pairs.append(pair) or original(self, *pair))
    generate(tiny, WEAK, inputs, new=1)
    with installed(tiny.model) as parts:
        framing, layers = set(parts.structure_ids) | set(parts.image_ids), sorted(parts.heads)
        blocks = [parts.blocks[layer] for layer in layers]
    text = inputs["input_ids"][:, [int(t) not in framing for t in inputs["input_ids"][0]]]
    types = {k: torch.zeros_like(text) for k in inputs if k.endswith("token_type_ids")}
    blind = _head_outputs(tiny.model, blocks, input_ids=text, attention_mask=torch.ones_like(text), **types)
    seeing = _head_outputs(tiny.model, blocks, **inputs)
    assert len(pairs) == len(layers)
    for pair, *alone in zip(pairs, seeing, blind, strict=True):
        for got, want in zip(pair, alone, strict=True):
            torch.testing.assert_close(got[0].flatten(), want, atol=2e-5, rtol=1e-5)


def _head_outputs(model, blocks, **inputs):
    """Input of each block's output projection at the last position."""
    seen = []
    names = ("o_proj", "out_proj", "dense")
    projections = [next(m for name, m in block.named_modules() if name.endswith(names)) for block in blocks]
    handles = [p.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1])) for p in projections]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "internvl", "ovis2", "deepseek_vl", "instructblip"])
def test_packed_equals_rows(family, monkeypatch):
    tiny = families.build(family, fresh=True)
    inputs = tiny.inputs(list(tiny.rows))
    with wrap(tiny.model, None, "vhr") as vlm:
        assert vlm.compiled.packed
        packed = vlm.generate(**inputs, max_new_tokens=3, **OPTIONS)
        monkeypatch.setattr(Compiled, "packed", property(lambda self: False))
        rows = vlm.generate(**inputs, max_new_tokens=3, **OPTIONS)
    assert gap(packed, rows) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_nothing_of_the_second_prompt_stays(family):
    tiny = families.build(family)
    inputs = tiny.inputs([2, 1, 0])
    rows, length = inputs["input_ids"].shape
    result = generate(tiny, "vhr", inputs, output_hidden_states=True)
    for layer in result.past_key_values.layers:
        assert layer.keys.shape[:3:2] == (rows, length + 2)
    assert {states.shape[:2] for states in result.hidden_states[0]} == {(rows, length)}


def test_heads_stay_chosen_when_beams_move():
    tiny = families.build("llava")
    inputs = tiny.inputs([1, 2])
    one = generate(tiny, "vhr(alpha=3)", inputs, new=5, num_beams=3)
    two = generate(tiny, "vhr(alpha=3)", inputs, new=5, num_beams=3, use_cache=False)
    assert torch.equal(one.sequences, two.sequences)


def test_what_it_cannot_do_is_said():
    tiny = families.build("llava")
    with pytest.raises(Refusal, match="prefill_chunk_size"):
        generate(tiny, "vhr", tiny.inputs([1]), prefill_chunk_size=4)
    with pytest.raises(UsageError, match="visible"):
        generate(tiny, VHR(on="all"), tiny.inputs([1]))
    with pytest.raises(Refusal, match="kosmos-2"):
        generate(families.build("kosmos-2"), "vhr", tiny.inputs([1]))


def test_no_head_is_chosen_twice_as_strong_by_ties():
    same = torch.ones(1, 4, 8)
    assert Reinforce(2.0)(same, same).tolist() == [[1.0] * 4]
    single = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    assert Reinforce(2.0)(single, -single).tolist() == [[1.0], [1.0]]
