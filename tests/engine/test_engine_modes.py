"""What surrounds a replayed step: modes of torch, callers' objects, errors in the middle, models that change."""

import contextlib
import copy
import functools
import gc
import logging
import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.engine import fitting, forms, graph, sessions
from vlmfix.errors import UsageError
from vlmfix.hf import hooks, slots, stepping

from ..duties import lab
from ..duties.table import TABLE
from ..families import build
from . import tape

NEW = 6
BOTH = "pai+vcd(alpha=0.5,beta=0)"


@pytest.fixture(autouse=True, params=["captured", "as it is"])
def recorded(request, monkeypatch):
    if request.param == "captured":
        monkeypatch.setitem(sessions.RECORDERS, "cpu", tape.record)


def wrapped(recipe, engine="graph"):
    return vlmfix.wrap(lab.under("llava").model, None, recipe, engine=engine)


def inputs(*rows):
    return lab.under("llava").inputs(rows)


def generated(recipe, given, engine="graph", **options):
    with wrapped(recipe, engine) as vlm:
        out = vlm.generate(**given, max_new_tokens=NEW, **options)
        assert vlm.report["engine"]["name"] == engine, vlm.report["engine"]
    return out


def assert_close(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert lab.difference(one, other) < 5e-5


def test_processed_scores_are_those_of_the_loop():
    options = {"do_sample": True, "temperature": 0.5, "top_k": 5, "output_scores": True, "output_logits": True}
    outs = []
    for engine in ("hf", "graph"):
        torch.manual_seed(0)
        outs.append(generated("greedy", inputs(1, 2), engine, return_dict_in_generate=True, **options))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert_close(outs[1].scores, outs[0].scores)
    assert_close(outs[1].logits, outs[0].logits)


def test_draws_without_a_seed_follow_the_generator_of_torch():
    outs = []
    for engine in ("hf", "graph"):
        with wrapped("greedy", engine) as vlm:
            for _ in range(2):
                torch.manual_seed(0)
                outs.append(vlm.generate(**inputs(1, 2), max_new_tokens=NEW, do_sample=True))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_as_many_scores_as_tokens_where_all_end_early():
    options = {"do_sample": True, "seed": 3}
    end = int(generated("greedy", inputs(1), **options)[0, -NEW + 1])
    for engine in ("hf", "graph"):
        with wrapped("greedy", engine) as vlm:
            out = vlm.generate(
                **inputs(1),
                **options,
                max_new_tokens=20,
                eos_token_id=end,
                output_scores=True,
                return_dict_in_generate=True,
            )
        assert len(out.scores) == 2


def test_the_callers_cache_is_left_to_the_loop():
    with wrapped("greedy") as vlm:
        cache = DynamicCache(config=lab.under("llava").model.config.text_config)
        out = vlm.generate(**inputs(1), past_key_values=cache, max_new_tokens=NEW)
        assert "past_key_values" in vlm.report["engine"]["reason"]
    assert cache.get_seq_length() == out.shape[1] - 1


def test_inference_mode_and_without():
    given = inputs(1, 2)
    with wrapped(BOTH) as vlm:
        with torch.inference_mode():
            one = vlm.generate(**given, max_new_tokens=NEW)
        two = vlm.generate(**given, max_new_tokens=NEW)
        with torch.inference_mode():
            three = vlm.generate(**given, max_new_tokens=NEW)
        assert vlm.report["engine"]["reused"]
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_a_slip_shows_before_a_checkpoint_is_read():
    with pytest.raises(UsageError, match="engine='fast'"):
        vlmfix.load("no-such-model", engine="fast")
    with pytest.raises(UsageError, match="compile=True"):
        vlmfix.load("no-such-model", engine="hf", compile=True)
    with pytest.raises(UsageError, match="vra"):
        vlmfix.load("no-such-model", "vra")


def test_where_nothing_is_compiled_the_report_says_so():
    with vlmfix.wrap(lab.under("llava").model, None, "pai", compile=True) as vlm:
        vlm.generate(**inputs(1), max_new_tokens=2)
    assert "compiles no steps on cpu" in vlm.report["engine"]["reason"]


@pytest.mark.parametrize(("engine", "level"), [("graph", logging.WARNING), ("auto", logging.INFO)])
def test_only_who_asked_for_captured_steps_is_warned(engine, level, monkeypatch, caplog):
    monkeypatch.setattr(hooks, "_WARNED", set())
    monkeypatch.setattr(graph.Engine, "wanted", lambda self, parts: self.kind != "hf")  # as on a GPU
    with caplog.at_level(logging.INFO, "vlmfix"), wrapped("pai", engine) as vlm:
        for _ in range(2):
            vlm.generate(**inputs(1), max_new_tokens=NEW, num_beams=2)
        assert vlm.report["engine"] == {"name": "hf", "reason": "beam search"}
    assert [(r.levelno, "beam search" in r.message) for r in caplog.records] == [(level, True)]


def test_where_nothing_is_captured_the_report_says_so():
    with wrapped("pai") as vlm:
        vlm.generate(**inputs(1), max_new_tokens=2)
        report = vlm.report["engine"]
    assert report["captured"] == ("cpu" in sessions.RECORDERS)
    assert report["captured"] or "no graphs on cpu" in report["reason"]


def _failing(*names):
    @contextlib.contextmanager
    def around(name):
        if name in names:
            raise RuntimeError(f"no step runs {name}")
        yield

    return tuple(forms.Form(name, functools.partial(around, name)) for name in (forms.COMPILED, "fused"))


@pytest.mark.parametrize(
    ("failing", "form", "reason"),
    [
        ((), "compiled", None),
        (("compiled",), "fused", "RuntimeError: no step runs compiled"),
        (("compiled", "fused"), "as it is", "RuntimeError: no step runs compiled"),
        (("fused",), "as it is", None),
    ],
)
def test_the_report_says_why_what_was_asked_for_did_not_come_about(failing, form, reason, monkeypatch):
    made = _failing(*failing)
    monkeypatch.setattr(graph, "forms", lambda parts, compile: made[not compile :])
    with vlmfix.wrap(lab.under("llava").model, None, "pai", engine="graph", compile=failing != ("fused",)) as vlm:
        vlm.generate(**inputs(1), max_new_tokens=NEW)
        report = vlm.report["engine"]
    if "cpu" not in sessions.RECORDERS:
        reason = reason or "there are no graphs on cpu: every step runs anew"
    assert report["captured"] == ("cpu" in sessions.RECORDERS)
    assert (report["form"], report.get("reason")) == (form, reason)


def test_one_token_takes_no_step():
    with wrapped(BOTH) as vlm:
        got = vlm.generate(**inputs(1, 2), max_new_tokens=1)
        assert vlm.report["engine"]["name"] == "hf"
        assert not vlm._engine._sessions
        assert torch.equal(vlm.generate(**inputs(1, 2), max_new_tokens=2)[:, :-1], got)
        assert vlm.report["engine"]["steps"] == 1


def test_hooks_of_others_are_called_at_every_step():
    calls = []
    with wrapped("pai") as vlm:
        want = vlm.generate(**inputs(1), max_new_tokens=NEW)
        for module in (vlm.parts.top, vlm.parts.blocks[1]):
            handle = module.register_forward_hook(lambda *_: calls.append(1))
            assert torch.equal(vlm.generate(**inputs(1), max_new_tokens=NEW), want)
            assert "forward hook" in vlm.report["engine"]["reason"]
            handle.remove()
        assert len(calls) == 2 * NEW
        vlm.generate(**inputs(1), max_new_tokens=NEW)
        assert vlm.report["engine"]["reused"]


def test_autocast_runs_in_the_loop():
    with wrapped("pai") as vlm, torch.autocast("cpu", torch.bfloat16):
        vlm.generate(**inputs(1), max_new_tokens=NEW)
        assert "autocast" in vlm.report["engine"]["reason"]


def test_another_generation_within_one():
    with wrapped("pai") as vlm:
        alone = vlm.generate(**inputs(1), max_new_tokens=NEW)
        found = []

        class Asking(LogitsProcessor):
            def __call__(self, ids, scores):
                if ids.shape[1] == inputs(1)["input_ids"].shape[1] + 2:
                    found.append(vlm.generate(**inputs(1), max_new_tokens=NEW))
                    assert "within another" in vlm.report["engine"]["reason"]
                return scores

        def work():
            found.append(vlm.generate(**inputs(1), max_new_tokens=NEW, logits_processor=[Asking()]))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert len(found) == 2
    assert all(torch.equal(out, alone) for out in found)


class Failing(BaseStreamer):
    left = 4

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self):
        pass


def test_a_generation_that_breaks_off_leaves_nothing_behind():
    with wrapped(BOTH) as vlm:
        want = vlm.generate(**inputs(1), max_new_tokens=NEW)
        with pytest.raises(KeyboardInterrupt):
            vlm.generate(**inputs(2), max_new_tokens=NEW, streamer=Failing())
        assert torch.equal(vlm.generate(**inputs(1), max_new_tokens=NEW), want)
        assert vlm.report["engine"]["reused"]


def test_a_first_generation_that_breaks_off():
    with wrapped(BOTH) as vlm:
        with pytest.raises(KeyboardInterrupt):
            vlm.generate(**inputs(1), max_new_tokens=NEW, streamer=Failing())
        assert torch.equal(vlm.generate(**inputs(1), max_new_tokens=NEW), generated(BOTH, inputs(1), "hf"))


def test_steps_are_counted_by_the_report():
    with wrapped("vcd(alpha=0.5,beta=0)") as vlm:
        for _ in range(2):
            vlm.generate(**inputs(1, 2), max_new_tokens=NEW)
            assert vlm.report["methods"]["vcd"]["steps"] == NEW


class Listening(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("recipe", ["greedy", BOTH, "gift", TABLE["avisc"].full])
def test_a_session_keeps_nothing_of_a_call(recipe):
    given = {name: tensor.clone() for name, tensor in inputs(1, 2).items()}
    streamer = Listening()
    found = {"pixel_values": weakref.ref(given["pixel_values"]), "streamer": weakref.ref(streamer)}
    with wrapped(recipe) as vlm:
        vlm.generate(**given, max_new_tokens=NEW, streamer=streamer)
        del given, streamer
        gc.collect()
        assert not [name for name, kept in found.items() if kept() is not None]


def test_a_model_whose_weights_moved():
    tiny = build("llava", fresh=True)
    outs = []
    with vlmfix.wrap(tiny.model, None, "pai", engine="graph") as vlm:
        vlm.generate(**tiny.inputs((1, 2)), max_new_tokens=NEW)
        with torch.no_grad():
            for weight in tiny.model.parameters():
                weight.data = weight.data * 1.1
        other = dict(tiny.inputs((1, 2)))
        other["pixel_values"] = other["pixel_values"] + 0.1  # the encoding of equal pictures is remembered
        outs.append(lab.trace(vlm.generate, other, max_new_tokens=NEW))
        assert not vlm.report["engine"]["reused"]
    with vlmfix.wrap(tiny.model, None, "pai", engine="hf") as loop:
        lab.assert_same(outs[0], lab.trace(loop.generate, other, max_new_tokens=NEW), 5e-5)


def test_a_plain_model_that_becomes_wanted_later(monkeypatch):
    vlm = vlmfix.wrap(build("llava", fresh=True).model, None, "greedy")
    monkeypatch.setattr(vlm._engine, "kind", "graph")  # as when the model moves to a GPU
    want = generated("greedy", inputs(1, 2), "hf")
    for i in range(3):
        assert torch.equal(vlm.generate(**inputs(1, 2), max_new_tokens=NEW), want)
        assert vlm.report["engine"]["reused"] == (i > 0)


def without_memory(like, *shape, **options):
    if len(shape) == 1 and len(shape[0]) == 4:  # buffers of a cache
        raise torch.OutOfMemoryError("no memory")
    return torch.zeros(*shape, **{"dtype": like.dtype, "device": like.device, **options})


@pytest.mark.parametrize("why", ["memory", "layers"])
def test_what_shows_behind_the_prompt_runs_in_the_loop_with_nothing_done_twice(why, monkeypatch):
    if why == "memory":
        monkeypatch.setattr(fitting, "unused", lambda device: 0)
        monkeypatch.setattr(torch.Tensor, "new_zeros", without_memory)
    else:
        monkeypatch.setattr(slots, "why_not", lambda cache, depth: "some layers do not fit")
    notes = []

    class Noting(Listening):
        def put(self, value):
            notes.extend(value.flatten().tolist())

    with wrapped("pai") as vlm:
        options = {"do_sample": True, "seed": 1, "output_scores": True, "return_dict_in_generate": True}
        out = vlm.generate(**inputs(1), max_new_tokens=NEW, streamer=Noting(), **options)
        assert "fit" in vlm.report["engine"]["reason"]
        assert not vlm._engine._sessions
    assert notes == out.sequences[0].tolist()
    assert len(out.scores) == NEW


def test_the_bytes_of_a_cache():
    given = inputs(1, 2)
    with wrapped("pai") as vlm:
        vlm.generate(**given, max_new_tokens=NEW)
        (session,) = vlm._engine._sessions.values()
        layers = session.frame.cache.layers
        have = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
        grown = DynamicCache(config=vlm.parts.text_config)
        for i, layer in enumerate(layers):
            grown.update(layer.keys[:, :, :5], layer.values[:, :, :5], i)
        prefilled = stepping.Prefilled(torch.zeros(1), grown, torch.ones(2, 5))
        assert fitting.lacking(prefilled, session.capacity) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "unused", lambda device: 0)
            assert fitting.lacking(prefilled, session.capacity) == have - have * 5 // session.capacity


def test_a_copy_of_a_wrapped_model():
    with wrapped("greedy", "hf") as vlm:
        other = copy.deepcopy(vlm)
        want = vlm.generate(**inputs(1), max_new_tokens=NEW)
        assert torch.equal(other.generate(**inputs(1), max_new_tokens=NEW), want)


def test_two_recipes_on_one_model():
    pai, vcd = wrapped("pai"), wrapped("vcd(alpha=0.5,beta=0)")
    for _ in range(2):
        for vlm in (pai, vcd):
            out = vlm.generate(**inputs(1, 2), max_new_tokens=NEW)
            assert torch.equal(out, generated(vlm.recipe, inputs(1, 2), "hf"))
    pai.close()
    assert torch.equal(vcd.generate(**inputs(1, 2), max_new_tokens=NEW), generated(vcd.recipe, inputs(1, 2), "hf"))
    vcd.close()


@pytest.mark.parametrize("recipe", ["pai+vaf+vcd", "vhr", "gift", TABLE["avisc"].full, TABLE["iava"].full])
def test_rows_with_and_without_pictures_and_return_sequences(recipe):
    for rows in ((2, 1, 0), (0, 0)):
        assert torch.equal(generated(recipe, inputs(*rows)), generated(recipe, inputs(*rows), "hf"))
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 2}
    want = generated(recipe, inputs(1, 0), "hf", **options)
    assert torch.equal(generated(recipe, inputs(1, 0), **options), want)


@pytest.mark.parametrize("options", [{"max_time": 0.0}, {"min_new_tokens": 4, "eos_token_id": list(range(100))}])
def test_limits(options):
    assert torch.equal(generated("pai", inputs(1, 2), **options), generated("pai", inputs(1, 2), "hf", **options))


def test_numbers_that_overflowed_do_not_reach_the_next_answer():
    with wrapped("pai") as vlm:
        want = vlm.generate(**inputs(1), max_new_tokens=NEW)
        for session in vlm._engine._sessions.values():
            for layer in session.frame.cache.layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
        assert torch.equal(vlm.generate(**inputs(1), max_new_tokens=NEW), want)
        assert vlm.report["engine"]["reused"]


class LongEnough(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= self.length + 2 * i for i in range(len(ids))])


def test_without_end_tokens_a_stopped_row_goes_on_as_in_the_loop(monkeypatch):
    for name in ("eos_token_id", "pad_token_id"):
        monkeypatch.setattr(lab.under("llava").model.generation_config, name, None)
    given = inputs(1, 2)
    criteria = [LongEnough(given["input_ids"].shape[1] + 2)]
    outs = [generated("greedy", given, engine, stopping_criteria=criteria) for engine in ("hf", "graph")]
    assert torch.equal(*outs)
