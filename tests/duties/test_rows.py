"""What one row gets does not depend on the others."""

import pytest
import torch

from ..families import SPECS, build
from . import lab
from .table import TABLE


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", everywhere=True, capability="greedy batch"))
def test_a_padded_batch_equals_its_rows_alone(family, method):
    if not SPECS[family].left_padding:
        pytest.skip(f"left-padded rows of {family} differ from rows alone without us too")
    recipe, rows = TABLE[method].full, build(family).rows
    batch = lab.fixed(family, recipe, rows)
    for i, pictures in enumerate(rows):
        alone = lab.fixed(family, recipe, (pictures,), key=i)
        lab.assert_same(batch.row(i), alone, lab.ROUGH.get(family, lab.LOGITS))


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="no-image"))
def test_without_a_picture_nothing_acts(family, method):
    if 0 not in SPECS[family].images:
        pytest.skip(f"{family} takes pictures only")
    fixed = lab.vlm(family, TABLE[method].full)
    if not fixed.recipe.methods[0].needs_picture:
        pytest.skip(f"{method} acts without pictures")
    got, want = lab.fixed(family, TABLE[method].full, (0, 0)), lab.plain(family, (0, 0))
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.tokens, want.tokens)
    lab.trace(fixed.generate, lab.under(family).inputs([0]), max_new_tokens=1)
    assert fixed.report["methods"][method]["rows"] == 0
    assert fixed.report["methods"][method]["inactive"] == "no row has a picture"


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="no-image"))
def test_a_row_without_a_picture_is_left_alone(family, method):
    if set(build(family).spec.images) < {0, 1} or not build(family).spec.uneven:
        pytest.skip(f"{family} takes no batch of rows with and without pictures")
    if not lab.vlm(family, TABLE[method].full).recipe.methods[0].needs_picture:
        pytest.skip(f"{method} acts without pictures")
    rows = (max(build(family).spec.images), 0)
    got, want = lab.fixed(family, TABLE[method].full, rows), lab.plain(family, rows)
    lab.assert_same(got.row(1), want.row(1))
    if family not in TABLE[method].faint:
        assert lab.difference(lab.normalised(got).logits[:, 0], lab.normalised(want).logits[:, 0]) > 1e-3


@pytest.mark.parametrize(("family", "method"), lab.pairs("full", capability="images"))
def test_every_one_of_two_pictures_counts(family, method):
    if 2 not in SPECS[family].images:
        pytest.skip(f"{family} takes one picture")
    tiny, fixed = lab.under(family), lab.vlm(family, TABLE[method].full)
    before = lab.fixed(family, TABLE[method].full, (2,), max_new_tokens=1)
    assert fixed.report["pictures"] == [2] or tiny.family in (
        "idefics3",
        "smolvlm",
        "fuyu",
        "llama4",
        "molmo2",
        "ovis2",
    )
    for picture in (0, 1):
        other = lab.trace(fixed.generate, tiny.inputs([2], changed={(0, picture)}), max_new_tokens=1)
        assert lab.difference(before.logits, other.logits) > 1e-3
