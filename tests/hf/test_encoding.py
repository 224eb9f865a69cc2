"""Remembered pictures: what the tower made of them counts while its weights stay."""

import copy
import pickle

import pytest
import torch

import vlmfix
from vlmfix.hf import encoding, hooks

from ..families import build


def _tower(model):
    return model.model.vision_tower.parameters()


@torch.no_grad()
def replaced(model):
    for weight in _tower(model):
        weight.data = weight.data * 1.3


@torch.no_grad()
def replaced_twice(model):
    """The second time the addresses of the first weights are free again."""
    for _ in range(2):
        replaced(model)


@torch.no_grad()
def stepped(model):
    for weight in _tower(model):
        weight.add_(0.1)


def loaded(model):
    model.load_state_dict({name: tensor * 1.3 for name, tensor in model.state_dict().items()})


def merged(model):
    """As peft merges: a write that torch does not count."""
    layer = model.model.multi_modal_projector.linear_1
    layer.merged_adapters = ["default"]
    layer.weight.data += 0.3


@pytest.mark.parametrize("engine", ["hf", "graph"])
@pytest.mark.parametrize("change", [replaced, replaced_twice, stepped, loaded, merged])
def test_a_tower_that_changed_encodes_again(change, engine):
    tiny = build("llava", fresh=True)
    options = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    with vlmfix.wrap(tiny.model, None, "vcd(alpha=0.5,beta=0)", engine=engine) as vlm:
        before = vlm.generate(**tiny.inputs((1,)), **options).logits[0]
        change(tiny.model)
        got = vlm.generate(**tiny.inputs((1,)), **options).logits[0]
    with vlmfix.wrap(tiny.model, None, "vcd(alpha=0.5,beta=0)", engine="hf") as fresh:
        want = fresh.generate(**tiny.inputs((1,)), **options).logits[0]
    assert torch.equal(got, want)
    assert not torch.equal(got, before)


def _counted(tiny, change):
    seen = []
    handle = tiny.model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(1))
    with vlmfix.wrap(tiny.model, None, "greedy", engine="hf") as vlm:
        for _ in range(2):
            vlm.generate(**tiny.inputs((1,)), max_new_tokens=2)
            change(vlm.parts)
    handle.remove()
    return len(seen)


def test_weights_of_decoder_blocks_do_not_count():
    @torch.no_grad()
    def change(parts):
        for weight in parts.blocks[0].parameters():
            weight.add_(0.1)

    assert _counted(build("llava", fresh=True), change) == 1


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        tiny = build("llava", fresh=True)
    with torch.inference_mode():
        assert _counted(tiny, lambda parts: None) == 1


def test_a_copy_remembers_nothing():
    tiny = build("llava", fresh=True)
    with vlmfix.wrap(tiny.model, None, "greedy", engine="hf") as vlm:
        vlm.generate(**tiny.inputs((1,)), max_new_tokens=2)
        memory = vlm._encoded
    assert memory.key
    assert memory.weights
    for other in (copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other == encoding.Memory()


@pytest.mark.parametrize("asked", [False, True])
def test_states_of_the_towers_layers_are_let_go_unless_asked_for(asked):
    tiny = build("llava", fresh=True)
    pixels = tiny.inputs((1,))["pixel_values"]
    memory = encoding.Memory()
    options = {"output_hidden_states": True} if asked else {}
    with hooks.installed(tiny.model) as parts, encoding.once(parts, memory):
        first, second = (tiny.model.model.get_image_features(pixels, return_dict=True, **options) for _ in range(2))
    for output in (first, second, memory.value):
        assert (output.hidden_states is not None) == asked
        torch.testing.assert_close(output.pooler_output, first.pooler_output)
