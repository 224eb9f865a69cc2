"""What several attention methods in one recipe mean, against a dense calculation written out here.

In the order of the recipe: slopes multiply and biases add, masses are those of the softmax so modified, factors
multiply, head scales multiply last.
"""

import pytest
import torch

from tests import families
from tests.golden.attending import plan_of
from vlmfix.decoders.gift import GIFT
from vlmfix.decoders.locore import LocoRE
from vlmfix.decoders.pai import PAI
from vlmfix.decoders.vaf import VAF
from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.kernels.rules import FusedRule
from vlmfix.layout import Layout
from vlmfix.method import LayerContext
from vlmfix.plan import Plan

from .running import gap, generate

B, H, HKV, K, D = 2, 4, 2, 20, 8
SYSTEM, VISUAL, PROMPT = slice(0, 3), slice(3, 11), 16


@pytest.fixture
def layout():
    visual = torch.zeros(B, PROMPT, dtype=torch.bool)
    visual[:, VISUAL] = True
    return Layout.of(visual)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, heads, n, D, generator=generator) for heads, n in ((H, 1), (HKV, K), (HKV, K))]


def attend(tensors, plans):
    """One decode step at the last slot."""
    slots = torch.arange(K)
    return grouped_attention(*tensors, plans, None, D**-0.5, slots[-1:], slots)


def scores(tensors):
    q, k, _ = tensors
    return torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(H // HKV, 1)) * D**-0.5


def output(tensors, weights):
    return torch.einsum("bhqk,bhkd->bhqd", weights, tensors[2].repeat_interleave(H // HKV, 1))


def var_plan(layout):
    """Redistribution with hand-made sinks: slot 0 in the text, slot 5 in the picture."""
    groups = torch.zeros(B, PROMPT, dtype=torch.uint8)
    groups[:, VISUAL], groups[:, 5], groups[:, 0] = 1, 2, 3
    arguments = torch.tensor([1.0, 0.0, 0.4, 8.0, 1.0]).expand(B, -1)
    return Plan(groups, 4, layout.after_visual, rule=FusedRule("redistribute", arguments))


def redistributed(p):
    """The same on dense weights, in every row."""
    plain = torch.zeros(K, dtype=torch.bool)
    plain[VISUAL], plain[5] = True, False
    sinks = torch.zeros(K, dtype=torch.bool)
    sinks[[0, 5]] = True
    moved = 0.6 * p[..., sinks].sum(-1, keepdim=True)
    mass = p[..., plain].sum(-1, keepdim=True)
    return torch.where(plain, p * (1 + moved / mass), torch.where(sinks, 0.4 * p, p))


def test_slopes_of_one_group_multiply(layout, tensors):
    plans = [plan_of(PAI(alpha=0.5), layout, H), plan_of(VAF(alpha=0.2, beta=0.3), layout, H)]
    z = scores(tensors)
    z[..., VISUAL] *= torch.where(z[..., VISUAL] >= 0, 1.5, 0.5) * 1.2
    z[..., SYSTEM] *= 0.7
    for order in (plans, plans[::-1]):
        torch.testing.assert_close(attend(tensors, order), output(tensors, z.softmax(-1)), atol=1e-6, rtol=1e-5)


def test_masses_are_those_of_the_modified_softmax(layout, tensors):
    plans = [plan_of(VAF(alpha=0.5, beta=0.5), layout, H), var_plan(layout)]
    z = scores(tensors)
    z[..., VISUAL] *= 1.5
    z[..., SYSTEM] *= 0.5
    expected = output(tensors, redistributed(z.softmax(-1)))
    for order in (plans, plans[::-1]):
        torch.testing.assert_close(attend(tensors, order), expected, atol=1e-6, rtol=1e-5)
    unmodified = output(tensors, redistributed(scores(tensors).softmax(-1)))
    assert (unmodified - expected).abs().max() > 1e-2


def test_biases_add_and_head_scales_come_last(layout, tensors):
    locore = plan_of(LocoRE(beta=1.0, window=2), layout, H)
    again = plan_of(LocoRE(beta=0.5, window=1), layout, H)
    scale = torch.tensor([[1.0, 2.0, 0.5, 1.0]]).expand(B, H)
    heads = [Plan(torch.zeros(B, PROMPT, dtype=torch.uint8), 1, layout.last, head_scale=s) for s in (scale, scale + 1)]
    z = scores(tensors)
    z[..., K - 3 : K - 1] += torch.tensor(2.0).log()
    z[..., K - 2] += torch.tensor(1.5).log()
    expected = output(tensors, redistributed(z.softmax(-1))) * (scale * (scale + 1))[:, :, None, None]
    got = attend(tensors, [heads[0], locore, var_plan(layout), again, heads[1]])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_factors_multiply_weighted_keys_included(layout, tensors):
    generator = torch.Generator().manual_seed(2)
    weight = torch.where(layout.visual, 1 + 9 * torch.rand(B, PROMPT, generator=generator), 0.0)
    asked = torch.zeros(B, PROMPT, dtype=torch.bool)
    asked[:, 12:15] = True
    notes = {"weight": weight, "asked": asked, "lengths": asked.sum(1)}
    gift = GIFT().plan(LayerContext(0, layout, H, None, K - 1, {}, notes, None))
    assert isinstance(gift.rule, FusedRule)
    z = scores(tensors)
    z[..., VISUAL] *= torch.where(z[..., VISUAL] >= 0, 1.3, 0.7)
    p = z.softmax(-1)
    visual, question = p[..., VISUAL].sum(-1), p[..., 12:15].sum(-1)
    seeing = torch.zeros(B, H, 1, dtype=torch.bool).scatter(1, visual.topk(H // 2, 1).indices, True)
    asking = torch.zeros(B, H, 1, dtype=torch.bool).scatter(1, question.topk(H // 2, 1).indices, True)
    full = torch.nn.functional.pad(weight, (0, K - PROMPT))[:, None, None]
    gain = ((p * full).sum(-1) * seeing).sum(1, keepdim=True) / (visual * seeing).sum(1, keepdim=True)
    factor = torch.where(seeing[..., None] & (full > 0), full, 1.0)
    factor[..., 12:15] *= torch.where(asking, gain, 1.0)[..., None]
    factor = factor / (p * factor).sum(-1, keepdim=True)
    expected = output(tensors, redistributed(p) * factor)
    plans = [plan_of(PAI(alpha=0.3), layout, H), gift, var_plan(layout)]
    for order in (plans, plans[::-1]):
        torch.testing.assert_close(attend(tensors, order), expected, atol=1e-5, rtol=1e-4)


def test_methods_twice_are_twice_as_strong(layout, tensors):
    twice = [plan_of(PAI(alpha=0.5), layout, H)] * 2
    z = scores(tensors)
    z[..., VISUAL] *= torch.where(z[..., VISUAL] >= 0, 1.5**2, 0.5**2)
    torch.testing.assert_close(attend(tensors, twice), output(tensors, z.softmax(-1)), atol=1e-6, rtol=1e-5)


SINKS = "var(sink_dims=(3,4),tau=1.02,min_mass=0,keep_ratio=0,variant=reference)"
MIXED = ["pai", "vaf(alpha=0.5)", SINKS, "locore(beta=2)", "vhr", "gift", "fia(alpha=1)"]


@torch.no_grad()
@pytest.mark.parametrize("first", MIXED)
def test_recipes_of_two_act_together(first):
    """Every pair acts, as each of the two does, and as the same recipe without a cache."""
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    alone = generate(tiny, first, inputs, new=4)
    for second in MIXED[MIXED.index(first) + 1 :]:
        both = generate(tiny, f"{first}+{second}", inputs, new=4)
        assert all(not method.get("inactive") for method in both.report["methods"].values())
        assert gap(both, alone) > 1e-3
        assert gap(both, generate(tiny, f"{first}+{second}", inputs, new=4, use_cache=False)) < 5e-5


@torch.no_grad()
@pytest.mark.parametrize("pair", [("pai", "vaf(alpha=0.5)"), (SINKS, "pai"), ("gift", "pai"), (SINKS, "gift")])
def test_the_order_of_slopes_and_factors_does_not_matter(pair):
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    one, two = (generate(tiny, "+".join(order), inputs, new=3) for order in (pair, pair[::-1]))
    assert gap(one, two) < 2e-5


@torch.no_grad()
def test_attention_methods_go_with_contrast_and_all_its_rows():
    tiny = families.build("llava")
    inputs = tiny.inputs([2, 1, 0])
    visible = generate(tiny, "pai+vcd(beta=0)", inputs, new=2)
    everywhere = generate(tiny, "pai(on=all)+vcd(beta=0)", inputs, new=2)
    assert gap(visible, everywhere) > 1e-2
    cached = generate(tiny, "vhr+gift+vcd(beta=0)", inputs, new=3)
    uncached = generate(tiny, "vhr+gift+vcd(beta=0)", inputs, new=3, use_cache=False)
    assert gap(cached, uncached) < 5e-5
