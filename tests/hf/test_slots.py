"""A growing cache that lies in the buffers of a cache of fixed size, before and after."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicLayer

import vlmfix
from vlmfix.engine import fitting
from vlmfix.hf import attend, slots
from vlmfix.hf.slots import GrowingLayer, SlotCache, SlotLayer
from vlmfix.hf.stepping import Prefilled, Task

from ..duties import lab
from ..duties.table import TABLE
from ..families import build


def states(queries, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, queries, size, generator=generator) for size in (4, 6)]


class Holder:
    def __init__(self, *layers):
        self.layers = list(layers)

    def get_seq_length(self):
        return self.layers[0].keys.shape[2]


def grown(layer, *queries):
    for seed, count in enumerate(queries):
        out = layer.update(*states(count, seed))
    return out


@pytest.mark.parametrize("queries", [(5,), (5, 1, 1), (5, 4), (12,), (3, 9)], ids=str)
def test_it_grows_as_any_other(queries):
    for got, want in zip(grown(GrowingLayer(8), *queries), grown(DynamicLayer(), *queries), strict=True):
        assert torch.equal(got, want)


def test_its_buffers_are_taken_over_without_a_copy():
    layer = GrowingLayer(8)
    keys, values = grown(layer, 5)
    cache = SlotCache.of(Holder(layer), 8, torch.zeros(1, dtype=torch.long))
    assert cache.layers[0].keys.data_ptr() == keys.data_ptr()
    assert torch.equal(cache.layers[0].values[:, :, :5], values)
    assert not cache.layers[0].values[:, :, 5:].any()


@pytest.mark.parametrize("change", ["reorder", "crop", "outgrown"])
def test_what_left_the_buffer_is_copied(change):
    layer, plain = GrowingLayer(8), DynamicLayer()
    for each in (layer, plain):
        grown(each, 5)
        if change == "reorder":
            each.reorder_cache(torch.tensor([1, 0]))
        elif change == "crop":
            each.keys, each.values = each.keys[:, :, :4], each.values[:, :, :4]
        each.update(*states(9 if change == "outgrown" else 2, 7))
    length = plain.keys.shape[2]
    wanted = plain.keys.clone()
    cache = SlotCache.of(Holder(layer), 16, torch.zeros(1, dtype=torch.long))
    assert torch.equal(cache.layers[0].keys[:, :, :length], wanted)


def test_buffers_are_lent_where_they_fit():
    slot = torch.zeros(1, dtype=torch.long)
    lent = SlotLayer(torch.full((2, 2, 8, 4), 9.0), torch.full((2, 2, 8, 6), 9.0), slot, None)
    layer = GrowingLayer(8, lent)
    grown(layer, 5)
    assert layer.keys.data_ptr() == lent.keys.data_ptr()
    assert layer.own is None
    SlotCache(layers=[lent]).fill(Holder(layer), 5)
    assert torch.equal(lent.keys[:, :, :5], states(5)[0])
    assert not lent.values[:, :, 5:].any()
    other = GrowingLayer(8, SlotLayer(torch.zeros(3, 2, 8, 4), torch.zeros(3, 2, 8, 6), slot, None))
    grown(other, 5)
    assert other.own is not None


def test_buffers_that_are_there_need_no_more_memory(monkeypatch):
    monkeypatch.setattr(fitting, "unused", lambda device: 0)
    for layer, more in ((GrowingLayer(8), 0), (DynamicLayer(), 2 * 2 * 3 * (4 + 6) * 4)):
        grown(layer, 5)
        assert fitting.lacking(Prefilled(torch.zeros(2, 9), Holder(layer), torch.ones(2, 5)), 8) == more


@pytest.mark.parametrize("recipe", ["greedy", "pai", "vhr", "gift", "vcd(alpha=0.5,beta=0)"])
def test_the_prompt_is_read_into_the_cache_of_the_step(recipe, monkeypatch):
    places, read = [], Task.prefill

    def noting(task):
        out = read(task)
        places.append([layer.keys.data_ptr() for layer in out.cache.layers])
        return out

    monkeypatch.setattr(Task, "prefill", noting)
    with vlmfix.wrap(lab.under("llava").model, None, recipe, engine="graph") as vlm:
        for seed in (0, 1):
            inputs = build("llava", seed=seed).inputs((1, 2)) if seed else lab.under("llava").inputs((1, 2))
            vlm.generate(**inputs, max_new_tokens=6)
            (session,) = vlm._engine._sessions.values()
            assert [layer.keys.data_ptr() for layer in session.frame.cache.layers] == places[-1]
    assert places[0] == places[1]


class Clockwork(TorchDispatchMode):
    """Names of operations that write new integers or booleans, as those do that follow from where a step stands."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_floating_point()]
        if any(func._schema.is_mutable or t.untyped_storage().data_ptr() not in given for t in made):
            self.names.append(str(func))
        return out


def aside(kernel):
    """A kernel whose definition, which stands in for it on a CPU, is not counted."""

    def called(*args, **kwargs):
        with _disable_current_modes():
            return kernel(*args, **kwargs)

    return called


def clockwork(family, recipe, layers, rows):
    """Those of one step outside the kernels."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if family == "gemma3" else {}
    tiny = build(family, fresh=True, text_config={"num_hidden_layers": layers, **kinds})
    with vlmfix.wrap(tiny.model, None, recipe, engine="graph") as vlm:
        vlm.generate(**tiny.inputs(rows), max_new_tokens=6)
        (session,) = vlm._engine._sessions.values()
        assert len(session.frame.cache.layers) == layers
        assert {layer.window for layer in session.frame.cache.layers} == ({8, None} if kinds else {None})
        with Clockwork() as mode:
            session._advance()
    return sorted(mode.names)


@pytest.mark.parametrize("rows", [(1,), (1, 2)], ids=["one", "two"])
@pytest.mark.parametrize(
    "recipe", ["greedy", TABLE["var"].full, "pai", "vhr_local", TABLE["vcd"].full, "sid(from_layer=1)"]
)
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_more_layers_ask_no_more_often_where_the_step_stands(family, recipe, rows, monkeypatch):
    for module, name in ((attend, "grouped_attention"), (slots, "kv_write")):
        monkeypatch.setattr(module, name, aside(getattr(module, name)))
    few, many = (clockwork(family, recipe, layers, rows) for layers in (2, 6))
    assert few == many
    assert few
