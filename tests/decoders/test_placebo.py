"""Placebos do what their method does, elsewhere."""

import pytest
import torch
from PIL import Image
from vlmfix.eval.placebos import placebo_recipe as placebo

from vlmfix.api import load, wrap
from vlmfix.decoders.groups import per_group
from vlmfix.decoders.placebo import Heads, Moved, showing
from vlmfix.decoders.var import VAR
from vlmfix.decoders.vcd import VCD
from vlmfix.errors import Refusal, UsageError
from vlmfix.layout import Kind, Layout
from vlmfix.method import AttentionMethod, LayerContext
from vlmfix.plan import Plan

VISUAL = torch.tensor([[0] * 3 + [1] * 4 + [0] * 6, [0] * 2 + [1] * 4 + [0] * 7]).bool()
VALID = torch.ones_like(VISUAL)
VALID[0, 0] = False
LAYOUT = Layout.of(VISUAL, VALID)


def test_drawn_keys_are_text_and_as_many_as_visual_ones():
    moved = Moved.from_layout(LAYOUT, 3)
    assert moved.n_visual.tolist() == [4, 4]
    assert not (moved.visual & VISUAL).any()
    assert not (moved.visual & ~VALID).any()
    assert torch.equal(moved.after_visual, LAYOUT.after_visual)
    assert torch.equal(moved.last, LAYOUT.last)
    assert not moved.visual[:, -1].any()  # the row that answers
    others = [Moved.from_layout(LAYOUT, seed).visual for seed in range(4)]
    assert any(not torch.equal(others[0], other) for other in others)
    assert torch.equal(others[3], moved.visual)


def test_short_prompts_give_all_their_text_but_its_ends():
    visual = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    moved = Moved.from_layout(Layout.of(visual), 0)
    assert moved.visual[0].nonzero()[:, 0].tolist() == [7, 8]
    values = moved.values(torch.arange(10.0)[None])
    assert values[0, 7:9].tolist() == sorted(values[0, 7:9].tolist())
    assert values.isnan().sum() == 8
    assert set(values[0, 7:9].tolist()) <= set(range(1, 7))


class Tilted(AttentionMethod):
    """Raises visual keys in the first head alone."""

    def acts_on(self, depth):
        return (0, 1)

    def plan(self, context):
        groups = context.layout.visual.to(torch.uint8)
        slope = per_group((1, 2), groups).repeat(1, context.heads, 1)
        slope[:, 1:] = 1
        return Plan(groups, 2, context.layout.after_visual, slope_pos=slope, rule=lambda masses: masses[:, :1] + masses)


def _context(layer, heads=4):
    return LayerContext(layer, LAYOUT, heads, None, 0, {}, {}, None)


def test_heads_exchange_what_is_done_to_them():
    kind = type("TiltedPlacebo", (Heads, Tilted), {"seed_of_placebo": 0})
    plans = [kind().plan(_context(layer)) for layer in range(8)]
    places = {int((plan.slope_pos[0, :, 1] == 2).nonzero()) for plan in plans}
    assert len(places) > 1  # drawn anew in every layer
    for plan in plans:
        assert (plan.slope_pos[0, :, 1] == 2).sum() == 1
        assert torch.equal(plan.groups, Tilted().plan(_context(0)).groups)
        factors = plan.rule(torch.arange(4.0)[None, :, None, None].expand(1, 4, 1, 2))
        assert sorted(factors[0, :, 0, 0].tolist()) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def pico():
    with load("pico", device="cpu") as vlm:
        yield vlm


@pytest.fixture(scope="module")
def pictures():
    return [Image.effect_noise((96, 96), spread).convert("RGB") for spread in (30, 60, 90)]


def test_text_keys_stand_in_for_visual_ones_on_a_model(pico, pictures):
    answers = {}
    for recipe in ("pai(alpha=3)", placebo("pai(alpha=3)", "text-keys"), placebo("pai(alpha=3)", "text-keys", 1)):
        with wrap(pico.model, pico.processor, recipe) as vlm:
            answers[str(vlm.recipe)] = vlm.answer(pictures, "Describe the image.", max_new_tokens=12, details=True)
            (report,) = vlm.report["methods"].values()
            assert report["rows"] == 3
            assert report["layers"]
    texts = [[answer.text for answer in found] for found in answers.values()]
    assert texts[0] != texts[1]
    assert len(answers) == 3


def test_the_other_picture_is_what_the_branch_sees(pico, pictures):
    shown = [pictures[1], pictures[2], pictures[0]]
    recipe = placebo("vcd(alpha=2, beta=0)", "other-picture")
    with wrap(pico.model, pico.processor, recipe) as vlm:
        with showing(shown):
            together = vlm.answer(pictures, "Describe the image.", max_new_tokens=10)
        for picture, other, text in zip(pictures, shown, together, strict=True):
            with showing([other]):
                assert vlm.answer(picture, "Describe the image.", max_new_tokens=10) == text
        with showing(pictures):  # contrast with the row's own picture is no contrast
            own = vlm.answer(pictures, "Describe the image.", max_new_tokens=10)
        with pytest.raises(Refusal, match="needs the other items"):
            vlm.answer(pictures, "Describe the image.", max_new_tokens=2)
    assert own == pico.answer(pictures, "Describe the image.", max_new_tokens=10)
    assert own != together


def test_settings_and_presets_are_the_methods_own():
    made = placebo("var(move_fraction=0.3)", "heads", preset={"var": {"tau": 7.0, "move_fraction": 0.9}})
    (method,) = made.methods
    assert isinstance(method, VAR)
    assert (method.move_fraction, method.tau) == (0.3, 7.0)
    assert str(made).startswith("var[heads, seed 0](")
    assert made.hash != placebo("var(move_fraction=0.3)", "heads", 1, {"var": {"tau": 7.0}}).hash
    assert made.to_json()["methods"][0]["settings"]["tau"] == 7.0


def test_methods_without_such_a_choice_stay_or_are_refused(pico):
    both = placebo("var+vcd", "other-picture")
    assert type(both.methods[0]) is VAR
    assert isinstance(both.methods[1], VCD)
    assert type(both.methods[1]) is not VCD
    with pytest.raises(UsageError, match="unknown placebo 'head'; did you mean heads"):
        placebo("var", "head")
    with pytest.raises(Refusal, match="needs an attention method"):
        placebo("vcd", "heads")
    for recipe, kind, reason in (
        ("locore", "text-keys", "does not choose visual keys"),
        ("vhr", "text-keys", "does not choose visual keys"),
        ("dola", "other-picture", "no branch"),
    ):
        with pytest.raises(Refusal, match=reason):
            wrap(pico.model, pico.processor, placebo(recipe, kind))
    with (
        wrap(pico.model, pico.processor, placebo("pai", "heads")) as vlm,
        pytest.raises(Refusal, match="all heads alike"),
    ):
        vlm.answer(Image.new("RGB", (96, 96)), "What is this?", max_new_tokens=1)


def test_generated_and_padded_positions_stay_text():
    moved = Moved.from_layout(LAYOUT, 0)
    assert (moved.kinds[0, 0] == Kind.PAD).item()
    assert (moved.kinds[VISUAL] == Kind.SYSTEM).all()
