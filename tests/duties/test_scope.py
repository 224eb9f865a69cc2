"""A recipe acts where it was asked to, and the model is left exactly as it was."""

import contextvars
import threading

import pytest
import torch

import vlmfix
from vlmfix.recipe import Recipe

from ..families import build
from . import lab
from .table import TABLE


def state(model):
    """Everything an installation could leave behind; transformers' own hooks come with a first forward."""
    configs, hooks = [], []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None:
            configs.append((name, config._attn_implementation, config.to_json_string(use_diff=False)))
        counts = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_with_kwargs)
        hooks.append((name, *map(len, counts), len(module._forward_hooks_always_called), sorted(vars(module))))
    return configs, hooks, model.generation_config.to_json_string(use_diff=False), model.training


class Failing(torch.nn.Module):
    def __call__(self, input_ids, scores):
        raise ZeroDivisionError("in the middle of a generation")


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_the_model_is_restored(family, method):
    tiny = build(family, seed=1)
    inputs = tiny.inputs((1,))
    plain = tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    before = state(tiny.model)
    with vlmfix.wrap(tiny.model, None, TABLE[method].full) as fixed:
        fixed.generate(**inputs, max_new_tokens=1)
    assert state(tiny.model) == before
    with vlmfix.applied(tiny.model, None, TABLE[method].full):
        tiny.model.generate(**inputs, max_new_tokens=1)
        assert "generate" in vars(tiny.model)
    assert state(tiny.model) == before
    with pytest.raises(ZeroDivisionError), vlmfix.applied(tiny.model, None, TABLE[method].full):
        tiny.model.generate(**inputs, max_new_tokens=2, logits_processor=[Failing()])
    assert state(tiny.model) == before
    assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False), plain)


def test_a_dropped_wrapper_restores_the_model():
    tiny = build("llava", seed=1)
    before = state(tiny.model)
    fixed = vlmfix.wrap(tiny.model, None, TABLE["var"].full)
    assert state(tiny.model) != before
    del fixed
    assert state(tiny.model) == before


def test_the_last_of_several_users_restores_the_model():
    tiny = build("llava", seed=1)
    before = state(tiny.model)
    one, two = (vlmfix.wrap(tiny.model, None, TABLE[name].full) for name in ("var", "vcd"))
    inputs = tiny.inputs((1, 1))
    want = two.generate(**inputs, max_new_tokens=3)
    one.close()
    assert torch.equal(two.generate(**inputs, max_new_tokens=3), want)
    two.close()
    two.close()
    with pytest.raises(vlmfix.VlmfixError, match="this model was closed"):
        two.generate(**inputs, max_new_tokens=1)
    assert state(tiny.model) == before


def test_a_refused_recipe_leaves_nothing_behind():
    tiny = build("llava", seed=1)
    before = state(tiny.model)
    with pytest.raises(vlmfix.Refusal):
        vlmfix.wrap(tiny.model, None, "vcd+m3id")
    with pytest.raises(vlmfix.VlmfixError), vlmfix.applied(tiny.model, None, "var(keep_ratio=7)"):
        pass
    assert state(tiny.model) == before


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_applied_gives_what_wrapping_gives(family, method):
    tiny = lab.under(family)
    rows = tiny.rows
    want = lab.fixed(family, TABLE[method].full, rows)
    with vlmfix.applied(tiny.model, None, TABLE[method].full):
        got = lab.trace(tiny.model.generate, tiny.inputs(rows))
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.tokens, want.tokens)


def test_contexts_nest_and_the_innermost_counts():
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1, 1))

    def run():
        return lab.trace(tiny.model.generate, inputs).logits

    before, plain = state(tiny.model), run()
    wanted = {}
    for name in ("var", "vcd"):
        with vlmfix.applied(tiny.model, None, TABLE[name].full):
            wanted[name] = run()
    with vlmfix.applied(tiny.model, None, TABLE["var"].full):
        assert torch.equal(run(), wanted["var"])
        with vlmfix.applied(tiny.model, None, TABLE["vcd"].full):
            assert torch.equal(run(), wanted["vcd"])
            with vlmfix.applied(tiny.model, None, "greedy"):
                assert torch.equal(run(), plain)
        assert torch.equal(run(), wanted["var"])
        fixed = vlmfix.wrap(tiny.model, None, TABLE["vcd"].full)
        assert torch.equal(lab.trace(fixed.generate, inputs).logits, wanted["vcd"])
        fixed.close()
        assert torch.equal(run(), wanted["var"])
    assert state(tiny.model) == before
    assert torch.equal(run(), plain)


def test_contexts_on_two_models_do_not_meet():
    one, other = build("llava", seed=1), build("qwen2_5_vl", seed=1)
    inputs = other.inputs((1,))
    plain = lab.trace(other.model.generate, inputs)
    with vlmfix.applied(one.model, None, TABLE["vcd"].full):
        assert torch.equal(lab.trace(other.model.generate, inputs).logits, plain.logits)
        with vlmfix.applied(other.model, None, TABLE["var"].full):
            acted = lab.trace(one.model.generate, one.inputs((1,)))
    assert not torch.equal(acted.logits, lab.trace(one.model.generate, one.inputs((1,))).logits)


def test_threads_with_different_recipes_share_a_model():
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1, 1))
    recipes = ("greedy", TABLE["var"].full, TABLE["vcd"].full)
    wanted = {}
    for recipe in recipes:
        with vlmfix.applied(tiny.model, None, recipe):
            wanted[recipe] = lab.trace(tiny.model.generate, inputs).logits
    barrier, wrong = threading.Barrier(len(recipes)), []

    def work(recipe):
        barrier.wait()
        for _ in range(4):
            with vlmfix.applied(tiny.model, None, recipe):
                got = lab.trace(tiny.model.generate, inputs).logits
            if not torch.equal(got, wanted[recipe]):
                wrong.append(recipe)

    before = state(tiny.model)
    threads = [threading.Thread(target=work, args=(recipe,)) for recipe in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state(tiny.model) == before


def test_a_thread_takes_the_recipe_along_in_a_copied_context(caplog):
    tiny = build("llava", seed=1)
    inputs, got = tiny.inputs((1,)), {}

    def run(name):
        got[name] = lab.trace(tiny.model.generate, inputs).logits

    run("plain")
    with vlmfix.applied(tiny.model, None, TABLE["vcd"].full):
        run("here")
        context = contextvars.copy_context()
        for name, target in (("copied", lambda: context.run(run, "copied")), ("new", lambda: run("new"))):
            thread = threading.Thread(target=target, name=name)
            thread.start()
            thread.join()
    assert torch.equal(got["copied"], got["here"])
    assert torch.equal(got["new"], got["plain"])
    assert not torch.equal(got["here"], got["plain"])


@pytest.mark.parametrize("method", lab.METHODS)
def test_saved_and_loaded_recipes_are_the_same(method, tmp_path):
    recipe = Recipe.parse(TABLE[method].full)
    recipe.save(tmp_path / "recipe.json")
    loaded = Recipe.load(tmp_path / "recipe.json")
    assert loaded == recipe
    assert (str(loaded), loaded.hash) == (str(recipe), recipe.hash)
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "method", [pair.values[1] for pair in lab.pairs("full", capability="greedy") if pair.values[0] == "llava"]
)
def test_forwards_inside_a_context_are_under_the_recipe(method):
    """Prefill and steps by hand equal generate's."""
    tiny = build("llava", seed=1)
    inputs = tiny.inputs((1, 1))
    with torch.no_grad(), vlmfix.applied(tiny.model, None, TABLE[method].full):
        want = lab.trace(tiny.model.generate, inputs, max_new_tokens=3)
        mask = inputs["attention_mask"]
        out = tiny.model(**inputs, use_cache=True, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        logits = [out.logits[:, -1]]
        for _ in range(2):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            token = logits[-1].argmax(-1)[:, None]
            settings = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            out = tiny.model(token, past_key_values=out.past_key_values, **settings)
            logits.append(out.logits[:, -1])
    assert lab.difference(torch.stack(logits), want.logits) <= lab.LOGITS
