"""A branch that sees what the visible rows see says nothing new; without weight there is no branch."""

import pytest
import torch

from vlmfix import registry
from vlmfix.api import wrap
from vlmfix.decoders.contrast import plausible
from vlmfix.method import DecodingMethod
from vlmfix.recipe import Recipe
from vlmfix.view import View

from ..duties.table import TABLE
from ..families import MAIN, build

BETA = 0.2
GREEDY = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
SHARPENED = {"agla": 1.5, "ritual": 1.5}
"""Methods that add both branches at alpha = 0.5: the sum is 1 + alpha times the original."""


def contrasting():
    """Methods with branches and what makes them strong, from the registry; no method that weighs nothing."""
    for row in registry.ROWS:
        method = Recipe.parse(TABLE[row.name].full).methods[0] if row.name in TABLE else None
        if isinstance(method, DecodingMethod) and (method.branches() or method.late()):
            yield row.name


def cases():
    return [
        (family, name)
        for family in MAIN
        for name in contrasting()
        if not TABLE[name].families or family in TABLE[name].families
    ]


@pytest.mark.parametrize(("family", "name"), cases())
def test_a_branch_equal_to_the_original_changes_no_greedy_token(family, name, monkeypatch):
    cls, recipe = registry.find(name), TABLE[name].full
    masked = "beta=0," in recipe or "beta=0)" in recipe
    recipe = recipe.replace("beta=0,", f"beta={BETA},").replace("beta=0)", f"beta={BETA})")
    count = len(Recipe.parse(recipe).methods[0].branches())
    monkeypatch.setattr(cls, "branches", lambda self: (View(),) * count)
    monkeypatch.setattr(cls, "attention", lambda self: ())
    monkeypatch.setattr(cls, "wiped", lambda self, notes, layout, visible: None)
    monkeypatch.setattr(cls, "redrawn", lambda self, notes, layout, visible: View())
    tiny = build(family, fresh=True)
    inputs = tiny.inputs(tiny.rows)
    plain = tiny.model.generate(**inputs, **GREEDY)
    with wrap(tiny.model, None, recipe) as fixed:
        got = fixed.generate(**inputs, **GREEDY)
        assert fixed.report["branches"] == 1
    assert torch.equal(got.sequences, plain.sequences)
    seen = torch.tensor([n > 0 for n in tiny.rows])
    for ours, theirs in zip(got.logits, plain.logits, strict=True):
        ours, theirs = ours[seen], theirs[seen] * SHARPENED.get(name, 1.0)
        kept = ours.isfinite()
        if masked:
            assert torch.equal(kept, plausible(theirs / SHARPENED.get(name, 1.0), BETA))
        a, b = (x.masked_fill(~kept, float("-inf")).log_softmax(-1)[kept] for x in (ours, theirs))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


WEIGHTS = {"m3id": "forget_rate=0", "pai_guidance": "gamma=1"}


@pytest.mark.parametrize("name", contrasting())
def test_without_weight_the_mask_stays_and_the_branch_goes(name):
    family = "llava"
    tiny = build(family, fresh=True)
    inputs = tiny.inputs(tiny.rows)
    plain = tiny.model.generate(**inputs, **GREEDY)
    with wrap(tiny.model, None, f"{name}({WEIGHTS.get(name, 'alpha=0')},beta={BETA})") as fixed:
        got = fixed.generate(**inputs, **GREEDY)
        assert fixed.report["branches"] == 0
        assert list(fixed.report["methods"]) == [name]
    assert torch.equal(got.sequences, plain.sequences)
    for row, pictures in enumerate(tiny.rows):
        for ours, theirs in zip(got.logits, plain.logits, strict=True):
            kept = (
                plausible(theirs[row : row + 1], BETA)[0] if pictures else torch.ones_like(ours[row], dtype=torch.bool)
            )
            assert torch.equal(ours[row].isfinite(), kept)
            shift = (ours[row] - theirs[row])[kept]
            torch.testing.assert_close(shift, shift[:1].expand_as(shift), atol=1e-5, rtol=0)
