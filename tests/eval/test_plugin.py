"""The plug-in against a stand-in of lmms-eval's few names, and against its own registry where it can be had.

`VLMFIX_LMMS_EVAL=DIR` names a folder that holds the package lmms_eval (an unpacked wheel, without its dependencies).
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from vlmfix.eval.plugin import CLASS_PATH
from vlmfix.eval.plugin import requests as reading

from vlmfix.errors import UsageError, VlmfixError

ROOT = Path(__file__).parents[2]


@dataclass
class TokenCounts:
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class Base:
    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *args: self.cached.append(args))
        self.cached = []

    def clean(self):
        self.cleaned = True


@dataclass
class Request:
    args: tuple


class Vlm:
    """Answers with what it was asked."""

    def __init__(self, recipe):
        self.recipe, self.calls, self.closed = recipe, [], False
        self.model = types.SimpleNamespace(device="cpu", config="config")

    def answer(self, images, prompts, *, ids=None, details=False, seed=None, **generation):
        assert details
        self.calls.append((list(ids), seed, generation))
        if any("bad" in prompt for prompt in prompts):
            raise RuntimeError("device lost")
        return [
            types.SimpleNamespace(text=f"{p} {len(i or [])} stop here\n\nmore", tokens=len(p))
            for p, i in zip(prompts, images, strict=True)
        ]

    def close(self):
        self.closed = True


@pytest.fixture
def plugin(monkeypatch):
    """The class under stand-ins of lmms_eval and vlmfix.load, and what load was called with."""
    for name, content in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Base},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vlmfix.eval.plugin.lmms", raising=False)
    loaded = []

    def load(model, recipe, **options):
        loaded.append((model, recipe, options, os.environ.get("WORLD_SIZE")))
        return Vlm(recipe)

    monkeypatch.setitem(sys.modules, "vlmfix.api", types.SimpleNamespace(load=load))
    module, name = CLASS_PATH.rsplit(".", 1)
    yield getattr(importlib.import_module(module), name), loaded
    sys.modules.pop("vlmfix.eval.plugin.lmms", None)


def content(text, images=1):
    return [{"type": "image", "url": f"picture {n}"} for n in range(images)] + [{"type": "text", "text": text}]


def requests(model, texts, **kwargs):
    model.task_dict = {"pope": {"test": [content(text, 1 + n % 2) for n, text in enumerate(texts)]}}
    to_messages = lambda doc: [{"role": "user", "content": doc}]  # noqa: E731
    return [Request((text, to_messages, dict(kwargs), n, "pope", "test")) for n, text in enumerate(texts)]


def test_answers_come_back_in_order_whatever_the_batches(plugin):
    model = plugin[0](model="m", method="vcd", batch_size="2")
    texts = ["a long question", "short", "a middling one", "tiny", "another"]
    results = model.generate_until(requests(model, texts, max_new_tokens=8, temperature=0, until=["stop", "\n\n"]))
    assert [r.text for r in results] == [f"{text} {1 + n % 2} " for n, text in enumerate(texts)]
    assert [r.token_counts.output_tokens for r in results] == [len(text) for text in texts]
    sizes = [len(ids) for ids, _, _ in model.vlm.calls]
    assert sizes == [2, 2, 1]
    assert model.vlm.calls[0][0] == ["pope/test/3", "pope/test/1"]  # short ones together
    assert model.vlm.calls[0][2] == {"max_new_tokens": 8, "do_sample": False}
    assert len(model.cached) == 5
    kwargs = {"max_new_tokens": 8, "temperature": 0, "until": ["stop", "\n\n"]}
    assert ("generate_until", ("short", kwargs), results[1].text) in model.cached


def test_the_default_blank_line_does_not_cut_captions(plugin):
    kind = plugin[0]
    model = kind()
    (kept,) = model.generate_until(requests(model, ["q"], until=["\n\n"]))
    assert kept.text.endswith("more")
    model = kind(blank_line_stops=True)
    (short,) = model.generate_until(requests(model, ["q"], until="\n\n"))
    assert short.text == "q 1 stop here"


def test_settings_that_differ_are_not_batched_together(plugin):
    model = plugin[0](batch_size=8)
    mixed = requests(model, ["a", "b", "c"], temperature=0)
    mixed[1].args[2]["max_new_tokens"] = 5
    model.generate_until(mixed)
    assert sorted(len(ids) for ids, _, _ in model.vlm.calls) == [1, 2]


def test_repeated_documents_draw_differently_and_seeds_are_passed(plugin):
    model = plugin[0](seed=7, batch_size=4)
    twice = requests(model, ["a"], temperature=0.7, do_sample=True) * 2
    model.generate_until(twice)
    ids, seed, settings = model.vlm.calls[0]
    assert ids == ["pope/test/0", "pope/test/0#2"]
    assert seed == 7
    assert settings == {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}


def test_a_failed_answer_ends_the_run_and_is_never_empty(plugin):
    model = plugin[0]()
    with pytest.raises(VlmfixError, match="no answer to pope/test/1: device lost"):
        model.generate_until(requests(model, ["good", "bad"]))


@pytest.mark.parametrize("key", ["alpha", "layers", "seed", "method", "stop_sequences"])
def test_hyper_parameters_in_gen_kwargs_are_refused(plugin, key):
    model = plugin[0]()
    with pytest.raises(UsageError, match=f"'{key}' is refused: lmms-eval's response cache"):
        model.generate_until(requests(model, ["q"], **{key: 1}))


def test_arguments(plugin, monkeypatch):
    kind, loaded = plugin
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    model = kind(pretrained="x", method='"vcd(alpha=1,beta=0.1)"', dtype="float16", max_batch_size=4)
    assert loaded == [("x", "vcd(alpha=1,beta=0.1)", {"dtype": "float16", "device": None}, None)]
    assert (model._rank, model._world_size) == (1, 2)
    assert model.device == "cpu"
    vlm = model.vlm
    model.clean()
    assert vlm.closed
    assert model.cleaned
    for arguments, message in [
        ({"metod": "vcd"}, "unknown model_args 'metod'; did you mean method"),
        ({"alpha": 1}, "hyper-parameters stand in the method"),
        ({"method": "vcd(alpha=1"}, "was cut at a comma"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
    ]:
        with pytest.raises(UsageError, match=message):
            kind(**arguments)


def test_likelihoods_and_conversations_are_refused(plugin):
    model = plugin[0]()
    for call in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UsageError, match="vlmfix"):
            call([])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for messages, message in [
        (turns, "t/0: 3 turns"),
        ([{"role": "user", "content": [{"type": "video", "url": "v"}]}], "t/0 holds video"),
        ([{"role": "user", "content": [*content("a"), *content("b")]}], "pictures between texts"),
        ([], "0 turns"),
    ]:
        with pytest.raises(UsageError, match=message):
            reading.asked("t/0", messages)


def test_system_prompts_and_plain_texts_are_read():
    found = reading.asked("x", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " What? "}])
    assert (found.system, found.prompt, found.images) == ("Be kind.", "What?", [])


def test_greedy_stays_greedy():
    assert reading.generation({"temperature": 0, "do_sample": True, "top_p": 0.9})[0]["do_sample"] is False
    assert reading.generation({"temperature": 0.0, "top_p": 0, "num_beams": 1})[0] == {
        "max_new_tokens": 1024,
        "do_sample": False,
    }
    assert reading.generation({"num_beams": 5})[0]["num_beams"] == 5


def test_the_entry_point_is_declared_and_light():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lmms_eval.models"] == {"vlmfix": "vlmfix.eval.plugin:manifest"}
    assert "vlmfix.eval.plugin" in project["tool"]["setuptools"]["packages"]
    code = "import sys, vlmfix.eval.plugin; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def registry_file():
    """registry_v2.py of lmms-eval, wherever it can be had."""
    given = os.environ.get("VLMFIX_LMMS_EVAL")
    if given:
        return Path(given) / "lmms_eval/models/registry_v2.py"
    found = importlib.util.find_spec("lmms_eval")
    return Path(found.origin).parent / "models/registry_v2.py" if found and found.origin else None


@pytest.mark.skipif(registry_file() is None, reason="lmms-eval is not here; VLMFIX_LMMS_EVAL=DIR names a copy")
def test_its_own_registry_finds_the_model(plugin, monkeypatch):
    spec = importlib.util.spec_from_file_location("lmms_eval.models.registry_v2", registry_file())
    registry = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lmms_eval.models", types.ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", registry)
    spec.loader.exec_module(registry)
    from vlmfix.eval.plugin import manifest

    entry = types.SimpleNamespace(load=lambda: manifest)
    made = registry.ModelRegistryV2()
    monkeypatch.setattr(made, "_select_entry_points", lambda group: [entry] if group == "lmms_eval.models" else [])
    made.load_entrypoint_manifests(overwrite=True)
    resolved = made.resolve("vlmfix")
    assert (resolved.model_type, resolved.class_path) == ("chat", CLASS_PATH)
    assert made.get_model_class("vlmfix").__name__ == "Vlmfix"
