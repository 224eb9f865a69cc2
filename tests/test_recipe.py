"""The grammar of recipes, their files, and what is decided when one is compiled."""

import json

import pytest

import vlmfix
from vlmfix.decoders.m3id import M3ID
from vlmfix.decoders.var import VAR
from vlmfix.decoders.vcd import VCD
from vlmfix.errors import Refusal, UsageError
from vlmfix.method import AttentionMethod, Greedy, ModelFacts, check_range, resolve_layers
from vlmfix.recipe import FORMAT, Recipe

from .families import build

FACTS = ModelFacts("llava", 8, dict.fromkeys(range(8), 4), 64, sink_dims=lambda: (1, 2))


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("greedy", (Greedy(),)),
        (" var ( tau = 3 ) + vcd(alpha=.5, beta=0) ", (VAR(tau=3), VCD(alpha=0.5, beta=0))),
        ("var(sink_dims=[1,2],layers=(0.25,1.0))", (VAR(sink_dims=(1, 2), layers=(0.25, 1.0)),)),
        ("var(variant=reference)", (VAR(variant="reference"),)),
        ("var(tau=None,variant='reference')", (VAR(variant="reference"),)),
        ("m3id(gate=-0.5)", (M3ID(gate=-0.5),)),
        ("vcd(alpha=1e+1)", (VCD(alpha=10.0),)),
        ("vcd()", (VCD(),)),
    ],
)  # fmt: skip
def test_a_text_is_read(text, methods):
    assert Recipe.parse(text).methods == methods


def test_semicolons_separate_recipes():
    recipes = Recipe.parse_many("greedy; vcd(alpha=1) ;var+vcd;")
    assert [str(recipe) for recipe in recipes] == ["greedy", "vcd", "var+vcd"]
    with pytest.raises(UsageError, match="holds 2 recipes"):
        Recipe.parse("greedy;vcd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vdc", r"unknown method 'vdc'; did you mean .*vcd"),
        ("vcd(alhpa=1)", r"vcd has no setting 'alhpa'; did you mean alpha"),
        ("greedy(x=1)", r"greedy has no setting 'x'; it has none"),
        ("vcd(1)", r"settings need their names"),
        ("vcd(**{'alpha': 1})", r"settings need their names"),
        ("vcd(alpha=1+1j*2)", r"not a number, text, list or None"),
        ("vcd(alpha=open('x'))", r"not a number, text, list or None"),
        ("vcd(alpha=1,alpha=2)", r"alpha is given twice"),
        ("vcd(alpha=1)(beta=2)", r"cannot read the settings of vcd"),
        ("vcd(alpha=1) or f(beta=2)", r"cannot read the settings of vcd"),
        ("vcd(alpha=)", r"cannot read the settings of vcd"),
        ("vcd(alpha=1", r"unbalanced brackets"),
        ("vcd alpha=1)", r"unbalanced|unknown method"),
        ("vcd(alpha=1) x", r"cannot read"),
        ("vcd(alpha='1)", r"unbalanced brackets or quotes"),
        ("vcd++var", r"recipe 'vcd\+\+var': a method's name is missing beside a '\+'"),
        ("(alpha=1)", r"a method's name is missing before its settings"),
        ("+vcd", r"a method's name is missing"),
        ("", r"empty recipe"),
        (" ; ", r"empty recipe"),
        ("nowhere.py:Mine", r"nowhere\.py: no such file"),
    ],
)
def test_a_wrong_text_is_answered_with_the_remedy(text, message):
    with pytest.raises(UsageError, match=message):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe((VCD(alpha=0.25), VAR(sink_dims=(3,), layers=(1, 2), variant="reference"))),
        Recipe.parse("icd(disturbance='You are confused; not + sure (at all).',place=last)"),
        Recipe.parse("icd(disturbance='None')"),
        Recipe.parse("icd(disturbance='in')"),
    ],
)
def test_the_text_of_a_recipe_reads_back(recipe):
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_recipes_come_from_methods_texts_and_sequences():
    wanted = Recipe((VAR(), VCD(alpha=2)))
    assert Recipe.of([VAR(), "vcd(alpha=2)"]) == wanted
    assert Recipe.of(wanted) is wanted
    assert Recipe.of([Recipe.of("var"), VCD(alpha=2)]) == wanted
    assert Recipe.of(VAR()) == Recipe.of("var")
    with pytest.raises(UsageError, match="cannot read a recipe from 3"):
        Recipe.of(3)


def test_the_hash_follows_every_setting():
    hashes = {
        Recipe.parse(text).hash for text in ("vcd", "vcd(alpha=2)", "vcd(noise_seed=1)", "var", "var+vcd", "vcd+var")
    }
    assert len(hashes) == 6
    assert Recipe.parse("vcd(alpha=1.0)").hash == Recipe.parse("vcd").hash
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in hashes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "one JSON object"),
        ({"methods": []}, "format None is not known"),
        ({"format": 99, "methods": []}, "format 99 is not known"),
        ({"format": FORMAT, "metods": []}, "unknown key 'metods'; did you mean methods"),
        ({"format": FORMAT, "methods": []}, "holds no method"),
        ({"format": FORMAT, "methods": [{"name": "vcd", "setings": {}}]}, "key 'setings'; did you mean settings"),
        ({"format": FORMAT, "methods": [{"name": "vcd", "settings": {"alpa": 1}}]}, "did you mean alpha"),
        ({"format": FORMAT, "methods": [{"settings": {}}]}, "needs a name"),
        ({"format": FORMAT, "methods": ["vcd"]}, "needs a name"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_answered_with_the_remedy(data, message, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        Recipe.load(tmp_path / "recipe.json")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match=r"recipe\.json: not a readable recipe file"):
        Recipe.load(tmp_path / "recipe.json")
    with pytest.raises(UsageError, match=r"other\.json: not a readable recipe file"):
        Recipe.load(tmp_path / "other.json")


MINE = """
from dataclasses import dataclass
from vlmfix.method import DecodingMethod

@dataclass(frozen=True)
class Mine(DecodingMethod):
    lift: float = 1.0
    token: int = 77

    def scores(self, logits, step):
        scores = logits.clone()
        scores[:, self.token] += self.lift
        return scores

class Other:
    pass
"""


def test_a_method_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    recipe = Recipe.parse(f"{file}:Mine(lift=1000)")
    assert str(recipe) == f"{file}:Mine(lift=1000)"
    assert recipe.evidence == "unregistered"
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json").hash == recipe.hash
    tiny = build("llava", fresh=True)
    with vlmfix.wrap(tiny.model, None, recipe) as vlm:
        assert (vlm.generate(**tiny.inputs([1]), max_new_tokens=3)[:, -3:] == 77).all()
        assert f"{file}:Mine" in vlm.report["methods"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:Mien", "has no class 'Mien'; did you mean Mine"),
        ("mine.py:Other", "is not a method; derive it from"),
        ("mine.py:Mine(lfit=1)", "has no setting 'lfit'; did you mean lift"),
        ("broken.py:Mine", r"broken\.py: running it failed \(ZeroDivisionError"),
    ],
)
def test_a_wrong_file_of_methods_is_answered_with_the_remedy(name, message, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=message):
        Recipe.parse(f"{tmp_path}/{name}")


def test_neutral_methods_are_dropped():
    compiled = Recipe.parse("var(move_fraction=0)+vcd(alpha=0,beta=0)+greedy").compile(FACTS)
    assert compiled.plain
    assert compiled.dropped == ("var", "vcd", "greedy")
    assert not Recipe.parse("vcd(alpha=0)").compile(FACTS).plain
    assert Recipe.parse("vcd(alpha=0)").compile(FACTS).views == ()


def test_methods_that_exclude_each_other_are_refused():
    with pytest.raises(Refusal, match="vcd and m3id both rewrite the logits"):
        Recipe.parse("vcd+m3id").compile(FACTS)
    Recipe.parse("vcd+m3id(forget_rate=0,beta=0)").compile(FACTS)


def test_layers_without_attention_are_left_out_and_none_left_is_refused():
    hybrid = ModelFacts("qwen3_5", 8, {3: 4, 7: 4}, 64, sink_dims=lambda: (1,))
    compiled = Recipe.parse("var(layers=(0.0,1.0))").compile(hybrid)
    assert compiled.layers == (frozenset({3}),)
    with pytest.raises(Refusal, match=r"var: none of its layers \[0, 1\] has attention in this qwen3_5 model"):
        Recipe.parse("var(layers=(0,1))").compile(hybrid)


def test_a_preset_fills_what_was_left_at_its_default():
    preset = {"var": {"sink_dims": [5, 6], "tau": 9.0, "unknown": 1}}
    method = Recipe.parse("var(tau=2.5)").compile(FACTS, preset).attention[0]
    assert isinstance(method, VAR)
    assert (method.sink_dims, method.tau) == ((5, 6), 2.5)
    assert Recipe.parse("var").compile(FACTS).attention[0].sink_dims == (1, 2)


def test_presets_are_found_by_the_last_part_of_a_name():
    from vlmfix.presets import preset

    known = preset("llava-hf/llava-1.5-7b-hf")
    assert known["var"]["sink_dims"] == [1415, 2533]
    assert preset("/models/LLaVA-1.5-7B-hf/") == known
    assert preset("llava-hf/no-such-model") == {}


def test_the_published_sinks_of_a_checkpoint_reach_its_recipe():
    from vlmfix.api import compile_for
    from vlmfix.hf.hooks import installed

    tiny = build("llava", fresh=True)
    tiny.model.config._name_or_path = "llava-hf/llava-1.5-13b-hf"
    with installed(tiny.model) as parts, pytest.raises(UsageError, match=r"\(2100, 4743\).* outside the hidden width"):
        compile_for(parts, Recipe.parse("var"))


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ((0.0, 1.0), 4, (0, 1, 2, 3)),
        ((0.0625, 1.0), 32, tuple(range(2, 32))),
        ((0.5, 1.0), 5, (3, 4)),
        ((0.28125, 0.46875), 32, tuple(range(9, 15))),
        ((0.5, 0.51), 8, (4,)),
        ((0, 1), 4, (0, 1)),
        ((3, -1, 1), 4, (1, 3)),
        ((2,), 4, (2,)),
    ],
)
def test_layers_are_fractions_of_depth_or_indices(spec, depth, layers):
    assert resolve_layers(spec, depth) == layers


@pytest.mark.parametrize(
    "spec",
    [(), (0.5, 0.5), (0.6, 0.5), (0.0, 1.5), (-0.1, 0.5), (0.1, 0.2, 0.3), (4,), (-5,), 3, "all", (None, 1.0), True],
)
def test_layers_that_make_no_sense_are_refused(spec):
    with pytest.raises(UsageError, match="layers="):
        resolve_layers(spec, 4)


def test_softcapped_scores_refuse_methods_that_change_scores():
    class Scaling(AttentionMethod):
        scales_scores = True

    with pytest.raises(Refusal, match="scaling changes attention scores, which gemma2 soft-caps"):
        Scaling().resolve(ModelFacts("gemma2", 2, {0: 1, 1: 1}, 8, softcap=True))
    with pytest.raises(UsageError, match="on='somewhere'"):
        VAR(on="somewhere").resolve(FACTS)


@pytest.mark.parametrize("value", [-0.1, 1.1, "x", None, True, float("nan"), (1,)])
def test_values_out_of_range_are_refused(value):
    with pytest.raises(UsageError, match=r"vcd\(beta=.*give a number from 0 to 1"):
        check_range(VCD(beta=value), "beta", 0, 1)
