"""Methods do nothing when told to do nothing, and something when told to do something."""

import pytest
import torch

import vlmfix
from vlmfix import registry

from ..families import FAMILIES, build
from . import lab
from .table import TABLE


def test_every_method_has_a_row():
    assert set(TABLE) == {row.name for row in registry.ROWS}, "give the new method a row in tests/duties/table.py"


@pytest.mark.parametrize(("family", "method"), lab.pairs("neutral", everywhere=True))
def test_neutral_is_bit_equal_to_plain(family, method):
    fixed = lab.vlm(family, TABLE[method].neutral)
    assert fixed.compiled.plain
    rows = build(family).rows
    got = lab.fixed(family, TABLE[method].neutral, rows)
    want = lab.plain(family, rows)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", everywhere=True, capability="greedy"))
def test_full_strength_acts(family, method):
    rows = build(family).rows
    got, want = lab.normalised(lab.fixed(family, TABLE[method].full, rows)), lab.normalised(lab.plain(family, rows))
    everyone = not lab.vlm(family, TABLE[method].full).recipe.methods[0].needs_picture
    if family in TABLE[method].faint:
        pytest.skip(f"{method} has no effect on the tiny {family} model")
    for i, pictures in enumerate(rows):
        changed = lab.difference(got.logits[:, i], want.logits[:, i])
        assert (changed > 1e-3) == (pictures > 0 or everyone), f"row {i}, {pictures} pictures, changed by {changed:.1e}"


@pytest.mark.parametrize(("family", "method"), lab.pairs("whisper"))
def test_a_whisper_changes_nothing(family, method):
    rows = build(family).rows
    fixed = lab.vlm(family, TABLE[method].whisper)
    assert not fixed.compiled.plain
    got = lab.fixed(family, TABLE[method].whisper, rows)
    lab.assert_same(lab.normalised(got), lab.normalised(lab.plain(family, rows)))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full"))
def test_the_report_says_what_acted(family, method):
    tiny = lab.under(family)
    fixed = lab.vlm(family, TABLE[method].full)
    inputs = tiny.inputs(tiny.rows)
    lab.trace(fixed.generate, inputs, max_new_tokens=1)
    report = fixed.report
    assert report["recipe"] == str(fixed.recipe)
    assert report["family"] == family
    assert report["visual_tokens"] == tiny.expected_visual(inputs).sum(1).tolist()
    acted = report["methods"][method]
    everyone = not fixed.recipe.methods[0].needs_picture
    assert acted["rows"] == (len(tiny.rows) if everyone else sum(count > 0 for count in tiny.rows))
    assert "inactive" not in acted
    if registry.row_of(fixed.recipe.methods[0]).kind == "attention":
        assert acted["layers"]
        assert set(acted["layers"]) <= set(fixed.parts.heads)


REFUSING = [(family, method) for family in FAMILIES for method in lab.METHODS if lab.refused(family, method)]


@pytest.mark.parametrize(("family", "method"), REFUSING)
def test_families_that_a_method_cannot_act_on_refuse(family, method):
    tiny = lab.under(family)
    with pytest.raises(vlmfix.Refusal, match=family), vlmfix.wrap(tiny.model, None, TABLE[method].full) as fixed:
        fixed.generate(**tiny.inputs([1]), max_new_tokens=1)
