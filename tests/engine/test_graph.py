"""Replayed steps give what transformers' own loop gives, and say so where they cannot be replayed."""

import logging
import threading
from types import FunctionType

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import vlmfix
from vlmfix.decoders import sgrs
from vlmfix.engine import compiling, fitting, graph, sessions
from vlmfix.errors import UsageError
from vlmfix.hf.families import FAMILIES as TABLE_OF_FAMILIES
from vlmfix.method import DecodingMethod

from ..duties import lab
from ..duties.table import TABLE
from ..families import FAMILIES, build
from ..families.checkpoints import make_tokenizer
from . import tape

REQUIRED = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "idefics3")
ELSEWHERE = {"opera", "vasparse_attention"}
NEW = 6
SALIENCY = (
    "sgrs(alpha=1,window=2)",
    "sgrs(alpha=1,window=0)",
    "sgrs(alpha=0.9,draw='sample',seed=1,layers=(1,2))",
    TABLE["var"].full + "+sgrs(alpha=1)",
    "vhr(alpha=4)+sgrs(alpha=1,window=2)",
)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setitem(sessions.RECORDERS, "cpu", tape.record)


def graphed(family, recipe):
    return vlmfix.wrap(lab.under(family).model, None, recipe, engine="graph")


def compared():
    for family in FAMILIES:
        for method in lab.METHODS:
            if not lab.refused(family, method):
                default = family in REQUIRED or method in ("greedy", "vcd")
                yield pytest.param(family, method, marks=() if default else pytest.mark.wide, id=f"{family}-{method}")


@pytest.mark.parametrize(("family", "method"), compared())
def test_a_replayed_step_gives_what_the_loop_gives(family, method):
    rows = build(family).rows
    want = lab.fixed(family, TABLE[method].full, rows, max_new_tokens=NEW)
    with graphed(family, TABLE[method].full) as vlm:
        got = lab.trace(vlm.generate, lab.under(family).inputs(rows), max_new_tokens=NEW)
    lab.assert_same(got, want, 5e-5)
    report = vlm.report["engine"]
    if family in REQUIRED and method not in ELSEWHERE:
        assert report["captured"], report
    refused = TABLE_OF_FAMILIES[family].replay
    assert (report["name"] == "hf") == bool(refused or method in ELSEWHERE), report
    assert refused in report.get("reason", "")


def test_families_that_cannot_be_replayed_are_known():
    refused = {name for name in FAMILIES if TABLE_OF_FAMILIES[name].replay}
    assert refused == {"mllama", "kosmos-2", "gemma4", "qwen3_5", "minicpmv4_6", "lfm2_vl", "llama4"}


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "as it is"])
@pytest.mark.parametrize(
    "recipe", ["greedy", TABLE["var"].full, "pai", TABLE["vcd"].full, "gift", "vhr", "sid(beta=0)", *SALIENCY]
)
def test_another_prompt_runs_on_the_same_step(recipe, captured, monkeypatch):
    if not captured:
        monkeypatch.delitem(sessions.RECORDERS, "cpu")
    tiny, rows = lab.under("llava"), (1, 2)
    with graphed("llava", recipe) as vlm:
        for seed in (0, 1, 2):
            inputs = build("llava", seed=seed).inputs(rows) if seed else tiny.inputs(rows)
            got = lab.trace(vlm.generate, inputs, max_new_tokens=NEW)
            with vlmfix.wrap(tiny.model, None, recipe, engine="hf") as loop:
                lab.assert_same(got, lab.trace(loop.generate, inputs, max_new_tokens=NEW), 5e-5)
            reused = vlm.report["engine"]["reused"]
            assert reused == (seed > 0 and not recipe.startswith("sid"))


@pytest.mark.parametrize("recipe", ["pai+vcd(alpha=0.5,beta=0)", SALIENCY[0]])
def test_a_longer_prompt_of_the_same_bucket_reuses_the_step(recipe, monkeypatch):
    monkeypatch.setattr(graph, "BUCKET", 64)
    tiny = lab.under("llava")
    with graphed("llava", recipe) as vlm:
        vlm.generate(**tiny.inputs((1, 1)), max_new_tokens=NEW)
        inputs = tiny.inputs((2, 1))
        got = lab.trace(vlm.generate, inputs, max_new_tokens=NEW)
        assert vlm.report["engine"]["reused"]
        with vlmfix.wrap(tiny.model, None, recipe, engine="hf") as loop:
            lab.assert_same(got, lab.trace(loop.generate, inputs, max_new_tokens=NEW), 5e-5)


@pytest.mark.parametrize("recipe", ["greedy", "pai", "vhr_local", TABLE["vcd"].full, SALIENCY[0]])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_a_step_serves_prompts_of_half_its_room(family, recipe, monkeypatch):
    monkeypatch.setattr(graph, "BUCKET", 1)
    tiny = lab.under(family)
    with graphed(family, recipe) as vlm, vlmfix.wrap(tiny.model, None, recipe, engine="hf") as loop:
        for length, new, reused in (
            (20, NEW, False),
            (6, NEW, True),
            (14, NEW - 2, True),
            (21, NEW, False),
            (9, NEW, True),
        ):
            inputs = tiny.inputs((1, 1), length, text_length=length)
            got = lab.trace(vlm.generate, inputs, max_new_tokens=new)
            lab.assert_same(got, lab.trace(loop.generate, inputs, max_new_tokens=new), 5e-5)
            assert vlm.report["engine"]["reused"] == reused, length
        monkeypatch.setattr(graph, "ROOMY", 0.5)
        vlm.generate(**inputs, max_new_tokens=NEW)
        assert not vlm.report["engine"]["reused"]


@pytest.mark.parametrize("engine", ["hf", "graph"])
def test_heads_stay_scaled_beside_a_late_branch(engine):
    """The branch has next to no weight, so what is left is what the heads' scales alone give."""
    recipe, rows = "vhr(alpha=3)", (1, 2)
    with vlmfix.wrap(lab.under("llava").model, None, f"{recipe}+{TABLE['avisc'].whisper}", engine=engine) as vlm:
        got = lab.trace(vlm.generate, lab.under("llava").inputs(rows), max_new_tokens=NEW)
    want = lab.fixed("llava", recipe, rows, max_new_tokens=NEW)
    lab.assert_same(got, want, 5e-5)
    assert lab.difference(want.logits[1], lab.plain("llava", rows, max_new_tokens=NEW).logits[1]) > 1e-2


def both(recipe, inputs, **options):
    """The same call in either engine."""
    outs = []
    for engine in ("hf", "graph"):
        with vlmfix.wrap(lab.under("llava").model, None, recipe, engine=engine) as vlm:
            given = {k: v() if isinstance(v, FunctionType) else v for k, v in options.items()}
            outs.append(vlm.generate(**inputs, **given))
            assert vlm.report["engine"]["name"] == engine, vlm.report["engine"]
    return outs


@pytest.mark.parametrize("recipe", ["greedy", "vcd(alpha=0.5,beta=0.1)"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 3, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "seed": 3, "top_k": 7, "num_return_sequences": 2},
        {"do_sample": True, "seed": 4, "min_p": 0.01, "repetition_penalty": 1.3},
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": lambda: [RepetitionPenaltyLogitsProcessor(3.0)]},
    ],
    ids=["top_p", "top_k-two", "min_p-penalty", "penalty", "ngrams", "own-processor"],
)
def test_choices_of_tokens_are_those_of_the_loop(recipe, options):
    inputs = lab.under("llava").inputs((1, 2))
    want, got = both(recipe, inputs, max_new_tokens=12, **options)
    assert torch.equal(want, got)


class LongEnough(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= self.length + i for i in range(len(ids))])


@pytest.mark.parametrize("new", [2, 12])
def test_sequences_end_where_the_loop_ends_them(new):
    inputs = lab.under("llava").inputs((1, 2, 0))
    plain, _ = both("greedy", inputs, max_new_tokens=12)
    length = inputs["input_ids"].shape[1]
    ends = [int(plain[0, length + 3]), int(plain[1, length + 5]), int(plain[2, length + 1])]
    for options in (
        {"eos_token_id": ends[:1]},
        {"eos_token_id": ends, "pad_token_id": 7},
        {"stopping_criteria": lambda: StoppingCriteriaList([LongEnough(length + 3)]), "eos_token_id": ends[1]},
    ):
        want, got = both("greedy", inputs, max_new_tokens=new, **options)
        assert torch.equal(want, got)


def test_stop_strings():
    tokenizer = make_tokenizer([])
    inputs = lab.under("llava").inputs((1, 2))
    plain, _ = both("pai", inputs, max_new_tokens=12)
    word = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] + 4])
    want, got = both("pai", inputs, max_new_tokens=12, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(want, got)
    assert not torch.equal(want, plain)


class Notes(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


def test_streaming():
    inputs = lab.under("llava").inputs((1,))
    notes = []
    for engine in ("hf", "graph"):
        notes.append(Notes())
        with vlmfix.wrap(lab.under("llava").model, None, "var(sink_dims=(3,4),tau=1.02)", engine=engine) as vlm:
            out = vlm.generate(**inputs, max_new_tokens=NEW, streamer=notes[-1])
    assert notes[0].ids == notes[1].ids == out[0].tolist()
    assert notes[1].ended


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 2}, "beam"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 7}, "prefill_chunk_size"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    ],
)
def test_what_cannot_be_replayed_runs_in_the_loop_and_says_why(options, word, caplog):
    inputs = lab.under("llava").inputs((1,))
    with caplog.at_level(logging.WARNING, "vlmfix"), graphed("llava", "pai") as vlm:
        got = vlm.generate(**inputs, max_new_tokens=NEW, **options)
        with vlmfix.wrap(lab.under("llava").model, None, "pai", engine="hf") as loop:
            want = loop.generate(**inputs, max_new_tokens=NEW, **options)
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, want)
    assert vlm.report["engine"]["name"] == "hf"
    assert word in vlm.report["engine"]["reason"]


def test_padding_inside_the_prompt_runs_in_the_loop():
    inputs = dict(lab.under("llava").inputs((1,)))
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, -2] = 0
    with graphed("llava", "greedy") as vlm:
        vlm.generate(**inputs, max_new_tokens=NEW)
        assert "padding" in vlm.report["engine"]["reason"]
        vlm.generate(**lab.under("llava").inputs((1,)), max_new_tokens=NEW)
        assert vlm.report["engine"]["name"] == "graph"


class Counting(DecodingMethod):
    """A method of a user's own with a counter in Python."""

    recipe_name = "counting"
    calls = 0

    def scores(self, logits, step):
        type(self).calls += 1
        return logits


def test_a_users_method_is_replayed_only_if_it_says_so():
    inputs = lab.under("llava").inputs((1,))
    with vlmfix.wrap(lab.under("llava").model, None, Counting(), engine="graph") as vlm:
        vlm.generate(**inputs, max_new_tokens=NEW)
        assert "counting" in vlm.report["engine"]["reason"]
        assert Counting.calls == NEW


class Reading(DecodingMethod):
    """A method that claims to be replayable and waits for the device."""

    replayable = True

    def scores(self, logits, step):
        return logits * float(logits.max() > -1e9)


def test_a_step_that_waits_for_the_device_runs_without_a_graph(caplog):
    inputs = lab.under("llava").inputs((1,))
    with (
        caplog.at_level(logging.WARNING, "vlmfix"),
        vlmfix.wrap(lab.under("llava").model, None, Reading(), engine="graph") as vlm,
    ):
        got = vlm.generate(**inputs, max_new_tokens=NEW)
    assert torch.equal(got, both("greedy", inputs, max_new_tokens=NEW)[0])
    assert vlm.report["engine"]["captured"] is False
    assert "_local_scalar_dense" in vlm.report["engine"]["reason"]
    assert "cannot be captured" in caplog.text


class Remembering(DecodingMethod):
    """A method that lowers the tokens it has favoured before."""

    recipe_name = "remembering"
    replayable = True
    grows = False

    def scores(self, logits, step):
        last = logits.argmax(-1, keepdim=True)
        if self.grows:
            step.notes["before"] = torch.cat([step.notes.get("before", last[:, :0]), last], 1)
            return logits.scatter(1, step.notes["before"], -9.0)
        before = step.notes.get("before", torch.zeros_like(logits))
        step.notes["before"] = before.scatter(1, last, -9.0)
        return logits + before


class Growing(Remembering):
    recipe_name = "growing"
    grows = True


def test_notes_go_from_step_to_step():
    inputs = lab.under("llava").inputs((1, 2))
    want, got = both(Remembering(), inputs, max_new_tokens=12)
    assert torch.equal(want, got)
    assert not torch.equal(want, both("greedy", inputs, max_new_tokens=12)[0])


def test_notes_that_grow_run_without_a_graph(caplog):
    inputs = lab.under("llava").inputs((1, 2))
    with caplog.at_level(logging.WARNING, "vlmfix"), graphed("llava", Growing()) as vlm:
        got = [vlm.generate(**inputs, max_new_tokens=12) for _ in range(2)]
        assert "notes before" in vlm.report["engine"]["reason"]
        assert vlm.report["engine"]["captured"] is False
    with vlmfix.wrap(lab.under("llava").model, None, Growing(), engine="hf") as loop:
        want = loop.generate(**inputs, max_new_tokens=12)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], want)


def test_a_step_that_fails_while_gradients_are_on_leaves_them_off(monkeypatch):
    monkeypatch.setattr(sgrs, "threshold", lambda history, alpha, window: history.new_tensor([float(history[0, 0])]))
    monkeypatch.setattr(fitting, "strangers", lambda parts: "")
    on = []
    with graphed("llava", "sgrs") as vlm:
        handle = vlm.parts.blocks[0].register_forward_pre_hook(lambda *_: on.append(torch.is_grad_enabled()))
        vlm.generate(**lab.under("llava").inputs((1,)), max_new_tokens=NEW)
        handle.remove()
        assert vlm.report["engine"]["captured"] is False
        assert "_local_scalar_dense" in vlm.report["engine"]["reason"]
    assert len(on) > NEW
    assert not any(on)


def test_threads_take_turns_on_a_captured_step():
    prompts = [build("llava", seed=seed).inputs((1,)) for seed in (1, 2, 3)]
    with graphed("llava", "vcd(alpha=0.5,beta=0)") as vlm:
        alone = [vlm.generate(**inputs, max_new_tokens=NEW) for inputs in prompts]
        found = [None] * 3

        def work(i):
            found[i] = vlm.generate(**prompts[i], max_new_tokens=NEW)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one, other)


def test_few_captured_steps_are_kept_and_close_frees_them():
    tiny = lab.under("llava")
    vlm = graphed("llava", "greedy")
    for rows in ((1,), (1, 1), (1, 1, 1)):
        vlm.generate(**tiny.inputs(rows), max_new_tokens=NEW)
    assert len(vlm._engine._sessions) == graph.KEPT
    vlm.close()
    assert not vlm._engine._sessions


def test_no_such_engine():
    with pytest.raises(UsageError, match=r"engine='fast'.*'graph'"):
        vlmfix.wrap(lab.under("llava").model, None, "greedy", engine="fast")


def test_auto_is_the_loop_on_a_cpu():
    with vlmfix.wrap(lab.under("llava").model, None, "pai") as vlm:
        vlm.generate(**lab.under("llava").inputs((1,)), max_new_tokens=2)
    assert vlm.report["engine"] == {"name": "hf"}


@pytest.mark.parametrize("recipe", ["greedy", "pai", "gift", "vhr", TABLE["vcd"].full, "dola(beta=0)"])
def test_compiled_blocks_give_what_the_loop_gives(recipe, monkeypatch):
    monkeypatch.setitem(compiling.SETTINGS, "backend", "aot_eager")
    monkeypatch.setitem(compiling.SETTINGS, "fullgraph", True)
    monkeypatch.delitem(sessions.RECORDERS, "cpu")
    rows = (1, 2)
    inputs = lab.under("llava").inputs(rows)
    with vlmfix.wrap(build("llava", fresh=True).model, None, recipe, engine="graph", compile=True) as vlm:
        got = lab.trace(vlm.generate, inputs, max_new_tokens=NEW)
        assert vlm.report["engine"]["form"] == "compiled", vlm.report["engine"]["reason"]
    lab.assert_same(got, lab.fixed("llava", recipe, rows, max_new_tokens=NEW), 5e-5)
    assert not any("forward" in vars(block) for block in vlm.parts.blocks.values())


def test_a_step_with_gradients_is_captured_without_compiling():
    inputs = lab.under("llava").inputs((1,))
    with vlmfix.wrap(lab.under("llava").model, None, "sgrs", engine="graph", compile=True) as vlm:
        got = lab.trace(vlm.generate, inputs, max_new_tokens=NEW)
    lab.assert_same(got, lab.fixed("llava", "sgrs", (1,), max_new_tokens=NEW), 5e-5)
    report = vlm.report["engine"]
    assert (report["captured"], report["form"]) == (True, "fused")
    assert "gradients" in report["reason"]


def test_what_does_not_compile_runs_as_it_is(monkeypatch, caplog):
    monkeypatch.setitem(compiling.SETTINGS, "backend", "no-such-backend")
    inputs = lab.under("llava").inputs((1,))
    with (
        caplog.at_level(logging.WARNING, "vlmfix"),
        vlmfix.wrap(lab.under("llava").model, None, "pai", engine="graph", compile=True) as vlm,
    ):
        got = lab.trace(vlm.generate, inputs, max_new_tokens=NEW)
    lab.assert_same(got, lab.fixed("llava", "pai", (1,), max_new_tokens=NEW), 5e-5)
    report = vlm.report["engine"]
    assert (report["captured"], report["form"]) == (True, "fused")
    assert "cannot be captured compiled" in caplog.text


def test_compiling_needs_the_engine():
    with pytest.raises(UsageError, match="compile=True"):
        vlmfix.wrap(lab.under("llava").model, None, "pai", engine="hf", compile=True)
