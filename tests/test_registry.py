"""The registry: literal rows that agree with the classes, methods of other packages, answers to wrong names."""

import dataclasses
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import get_type_hints

import pytest
import torch

import vlmfix
from vlmfix import registry
from vlmfix.api import compile_for
from vlmfix.errors import UsageError, VlmfixError
from vlmfix.hf.hooks import installed
from vlmfix.method import AttentionMethod, DecodingMethod, Greedy, Method
from vlmfix.recipe import GRADES, Recipe

from .duties.table import TABLE
from .families import build

ROWS = pytest.mark.parametrize("row", registry.ROWS, ids=lambda row: row.name)


@ROWS
def test_a_row_says_what_its_class_says(row):
    cls = row.load()
    assert issubclass(cls, Method)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    assert row.defaults == fields
    assert row.kind == cls.kind
    assert row.evidence in GRADES
    assert not row.paper or row.paper in cls.__doc__
    assert set(row.capabilities) <= set(registry.ALL)
    assert row.summary
    assert row.cost
    assert registry.row_of(cls()) is row
    assert registry.name_of(cls()) == row.name
    assert registry.find(row.name) is cls
    assert getattr(vlmfix, row.class_name) is cls
    assert row.class_name in dir(vlmfix)


@ROWS
def test_every_setting_is_explained(row):
    cls = row.load()
    text = " ".join((base.__doc__ or "") for base in cls.__mro__ if issubclass(base, Method))
    for name in row.defaults:
        assert f" {name}: " in text, f"{row.name}: the setting {name} is not in the class docstring's Args"


def test_names_are_unique_words():
    names = [row.name for row in registry.ROWS]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() and name == name.lower() for name in names)
    assert names == list(registry.names())


@pytest.fixture(scope="module")
def parts():
    tiny = build("llava", fresh=True)
    with installed(tiny.model) as parts:
        yield parts


WRONG = ("nonsense", -1e9, (None,), {"a": 1}, float("nan"))


@pytest.mark.parametrize(
    ("name", "field"),
    [(row.name, field) for row in registry.ROWS if row.name in TABLE for field in row.defaults],
    ids=lambda x: x,
)
def test_a_value_that_makes_no_sense_is_refused_when_compiled(name, field, parts):
    """Wrong values are errors of ours that name the setting, before anything runs."""
    method = Recipe.parse(TABLE[name].full).methods[0]
    for value in WRONG:
        if isinstance(value, str) and get_type_hints(type(method))[field] is str:
            continue  # free text
        with pytest.raises(VlmfixError, match=field):
            compile_for(parts, Recipe((dataclasses.replace(method, **{field: value}),)))


def test_listing_imports_no_torch():
    code = (
        "import sys, vlmfix, vlmfix.registry as r; dir(vlmfix); [row.class_name for row in r.ROWS]; r.names(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@dataclasses.dataclass(frozen=True)
class Foreign(DecodingMethod):
    """A method of another package."""

    lift: float = 1e4

    def scores(self, logits, step):
        return logits.index_add(1, torch.tensor([99]), torch.full((len(logits), 1), self.lift))


class NoMethod:
    pass


@pytest.fixture
def plugged(monkeypatch):
    """Entry points as another package would bring them."""

    def plug(**points):
        found = [EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == registry.GROUP else [])

    return plug


def test_methods_of_other_packages_are_found(plugged):
    plugged(foreign=f"{__name__}:Foreign")
    assert "foreign" in registry.names()
    recipe = Recipe.parse("foreign(lift=1e5)")
    assert recipe.methods == (Foreign(1e5),)
    assert str(recipe) == "foreign(lift=100000.0)"
    assert recipe.evidence == "unregistered"
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(UsageError, match=r"unknown method 'foregin'; did you mean foreign"):
        Recipe.parse("foregin")
    tiny = build("llava", fresh=True)
    with vlmfix.wrap(tiny.model, None, recipe) as vlm:
        assert (vlm.generate(**tiny.inputs([1]), max_new_tokens=2)[:, -2:] == 99).all()
        assert vlm.report["methods"]["foreign"]["rows"] == 1


def test_two_methods_of_one_name_are_an_error(plugged):
    plugged(vcd=f"{__name__}:Foreign")
    with pytest.raises(UsageError, match=r"several installed methods are called 'vcd': vlmfix\.decoders.*Foreign"):
        registry.find("vcd")


def test_an_entry_point_that_is_no_method_is_an_error(plugged):
    plugged(wrong=f"{__name__}:NoMethod")
    with pytest.raises(UsageError, match="wrong is not a method; derive it from"):
        Recipe.parse("wrong")


def test_a_recipe_has_the_weakest_evidence_of_its_methods():
    rows = {grade: next((r for r in registry.ROWS if r.evidence == grade), None) for grade in GRADES}
    weakest = [row for row in rows.values() if row is not None]
    assert Recipe(tuple(row.load()() for row in weakest)).evidence == weakest[-1].evidence
    assert Recipe((Greedy(),)).evidence == "ours"


def test_base_classes_ask_the_questions_that_methods_answer():
    assert Method().neutral() is False
    assert DecodingMethod().branches() == ()
    for unfinished in (lambda: AttentionMethod().acts_on(4), lambda: DecodingMethod().scores(None, None)):
        with pytest.raises(NotImplementedError):
            unfinished()
