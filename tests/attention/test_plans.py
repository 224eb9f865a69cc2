"""Every field of a plan does what `vlmfix.plan` says, against a form that computes one score at a time."""

import math
from dataclasses import replace

import pytest
import torch

from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.plan import Hidden, Plan, Rolling

from . import naive

B, H, HKV, Q, K, D, DV = 2, 4, 2, 5, 9, 8, 6
PROMPT = 7
"""Keys 7 and 8 were generated, the queries are the last five positions."""

Q_POS, K_POS = list(range(K - Q, K)), list(range(K))


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(B, n, m, d, generator=generator) for n, m, d in ((H, Q, D), (HKV, K, D), (HKV, K, DV)))


def causal(b, h, i, j):
    return 0.0 if K_POS[j] <= Q_POS[i] else None


GROUPS = torch.tensor([[0, 1, 1, 2, 0, 1, 2], [2, 2, 0, 1, 1, 0, 1]], dtype=torch.uint8)
BASE = Plan(GROUPS, 3, active_from=torch.tensor([5, 4]))


def table(*shape, seed=1, low=0.3, high=1.8):
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def rule(masses):
    """Factors that depend on every mass."""
    return 0.5 + masses.flip(-1) + 0.1 * torch.arange(masses.shape[-1])


EVERY = torch.tensor([0, 0])
FIELDS = {
    "slope": {"slope_pos": table(1, 1, 3)},
    "slopes by sign, head and row": {"slope_pos": table(B, H, 3), "slope_neg": table(B, H, 3, seed=2, low=-1)},
    "bias": {"bias": table(B, H, 3, low=-2, high=2)},
    "a bias that hides": {"bias": torch.tensor([[[0.0, -math.inf, 0.5]]])},
    "slopes of keys": {"key_slope": table(B, H, PROMPT)},
    "slopes of keys, one for all heads": {"key_slope": table(B, 1, PROMPT)},
    "rule": {"rule": rule},
    "weighted keys": {"rule": rule, "key_weight": table(B, PROMPT, low=-1)},
    "scales of heads": {"head_scale": table(B, H, low=-1)},
    "scales of heads, one row for all": {"head_scale": table(1, H)},
    "hidden keys": {"hidden": (Hidden(torch.tensor([6, 4]), torch.tensor([1, 0]), torch.tensor([4, 2])),)},
    "hidden intervals": {
        "hidden": (
            Hidden(torch.tensor([6, 4]), torch.tensor([1, 0]), torch.tensor([3, 2])),
            Hidden(torch.tensor([7, 8]), torch.tensor([5, 5]), torch.tensor([9, 7])),
        )
    },
    "rolling group": {"rolling": Rolling(1, 1, 2, torch.tensor([5, 3])), "slope_pos": table(B, H, 3)},
    "rolling group with a rule": {"rolling": Rolling(2, 0, 3, EVERY), "rule": rule, "n_groups": 3},
    "everything": {
        "slope_pos": table(B, H, 3),
        "slope_neg": table(1, H, 3, seed=3),
        "bias": table(1, 1, 3, low=-1),
        "key_slope": table(B, 1, PROMPT, seed=4),
        "key_weight": table(B, PROMPT, seed=5),
        "rule": rule,
        "head_scale": table(B, H, seed=6),
        "hidden": (Hidden(torch.tensor([7, 8]), torch.tensor([2, 2]), torch.tensor([4, 5])),),
        "rolling": Rolling(1, 0, 1, torch.tensor([6, 6])),
    },
}


def both(tensors, plans, sees=causal, mask=None, **how):
    q, k, v = tensors
    q_pos, k_pos = torch.tensor(Q_POS), torch.tensor(K_POS)
    got = grouped_attention(q, k, v, plans, mask, D**-0.5, q_pos, k_pos, **how)
    how.pop("causal", None)
    want, weights = naive.attend(q, k, v, plans, sees, D**-0.5, Q_POS, K_POS, **how)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-6)
    return got, weights


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_what_it_says(tensors, name):
    plan = replace(BASE, **FIELDS[name])
    got, _ = both(tensors, [plan])
    plain, _ = both(tensors, [])
    changed = (got - plain).abs().amax((1, 3)) > 1e-4
    starts = plan.hidden[0].query_from if name.startswith("hidden") else plan.active_from
    assert torch.equal(changed, torch.tensor(Q_POS)[None] >= starts[:, None])


@pytest.mark.parametrize(("one", "other"), [("slope", "bias"), ("rule", "weighted keys"), ("everything", "rule")])
def test_plans_act_in_order(tensors, one, other):
    first = replace(BASE, **FIELDS[one])
    second = replace(BASE, groups=GROUPS.flip(1), active_from=torch.tensor([6, 4]), **FIELDS[other])
    both(tensors, [first, second])
    both(tensors, [second, first])


def test_plans_of_the_same_groups_multiply_slopes_and_add_biases(tensors):
    q, k, v = tensors
    a, b = replace(BASE, slope_pos=table(B, H, 3)), replace(BASE, slope_pos=table(B, H, 3, seed=9))
    product = replace(BASE, slope_pos=a.slope_pos * b.slope_pos)
    c, d = replace(BASE, bias=table(B, H, 3)), replace(BASE, bias=table(B, H, 3, seed=9))
    total = replace(BASE, bias=c.bias + d.bias)
    for plans, joint in (((a, b), product), ((c, d), total)):
        x, y = (
            grouped_attention(q, k, v, p, None, 0.3, torch.tensor(Q_POS), torch.tensor(K_POS)) for p in (plans, [joint])
        )
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["everything", "rule", "bias"])
def test_softcap_and_sinks(tensors, name):
    plan = replace(BASE, **FIELDS[name])
    both(tensors, [plan], softcap=0.7)
    both(tensors, [plan], sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    both(tensors, [plan], softcap=0.7, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))


@pytest.mark.parametrize("name", ["everything", "rule", "bias"])
@pytest.mark.parametrize("kind", ["bool", "float", "float per head", "float with numbers", "lowest"])
def test_masks(tensors, name, kind):
    hidden = torch.rand(B, H if "head" in kind else 1, Q, K, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[:, :, :, 4] = False
    numbers = torch.randn(B, 1, Q, K, generator=torch.Generator().manual_seed(4))
    low = torch.finfo(torch.float32).min if kind == "lowest" else -math.inf
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, low)
    if kind == "float with numbers":
        mask = mask + numbers

    def sees(b, h, i, j):
        if hidden[b, min(h, hidden.shape[1] - 1), i, j]:
            return None
        return float(numbers[b, 0, i, j]) if kind == "float with numbers" else 0.0

    both(tensors, [replace(BASE, **FIELDS[name])], sees, mask)


def test_without_causality_everything_is_seen(tensors):
    both(tensors, [replace(BASE, **FIELDS["rule"])], lambda *place: 0.0, causal=False)


def test_slots_say_which_keys_are_meant(tensors):
    """A sliding layer holds the last keys only: the same slots, the same result."""
    q, k, v = tensors
    plan, start = replace(BASE, **FIELDS["everything"]), 4
    seen = torch.tensor(K_POS) >= start
    mask = seen[None, None, None] & (torch.tensor(K_POS)[None] <= torch.tensor(Q_POS)[:, None])
    q_pos, k_pos = torch.tensor(Q_POS), torch.tensor(K_POS)
    whole = grouped_attention(q, k, v, [plan], mask, 0.3, q_pos, k_pos)
    part = grouped_attention(q, k[:, :, start:], v[:, :, start:], [plan], mask[..., start:], 0.3, q_pos, k_pos[start:])
    torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_rows_that_see_nothing_are_finite_zeros(tensors, name, kind):
    q, k, v = tensors
    mask = (torch.tensor(K_POS)[None] <= torch.tensor(Q_POS)[:, None]).expand(B, 1, Q, K).clone()
    mask[1, :, 2] = False
    mask = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    out = grouped_attention(
        q, k, v, [replace(BASE, **FIELDS[name])], mask, 0.3, torch.tensor(Q_POS), torch.tensor(K_POS)
    )
    assert out.isfinite().all()
    assert (out[1, :, 2] == 0).all()


def test_statistics_go_to_the_sink(tensors):
    q, k, v = tensors
    got = {}
    plan = replace(BASE, statistics=frozenset({"mass", "lse"}), sink=lambda name, value: got.update({name: value}))
    plain, weights = both(tensors, [])
    out = grouped_attention(q, k, v, [plan], None, D**-0.5, torch.tensor(Q_POS), torch.tensor(K_POS))
    torch.testing.assert_close(out, plain, atol=1e-6, rtol=1e-6)
    for b in range(B):
        for i in range(Q):
            want = torch.tensor(naive.masses(plan, weights[b, :, i].tolist(), b, Q_POS[i], K_POS))
            torch.testing.assert_close(got["mass"][b, :, i], want, atol=1e-6, rtol=1e-6)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", q.unflatten(1, (HKV, -1)), k).flatten(1, 2) * D**-0.5
    scores = scores.masked_fill(torch.tensor(K_POS)[None] > torch.tensor(Q_POS)[:, None], -math.inf)
    torch.testing.assert_close(got["lse"], scores.logsumexp(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masses_and_softmax_are_float32_or_better(tensors, dtype):
    q, k, v = (x.to(dtype) for x in tensors)
    seen = {}

    def noted(masses):
        seen["dtype"] = masses.dtype
        return rule(masses)

    plan = replace(BASE, rule=noted)
    q_pos, k_pos = torch.tensor(Q_POS), torch.tensor(K_POS)
    out = grouped_attention(q, k, v, [plan], None, 0.3, q_pos, k_pos)
    assert out.dtype == dtype
    assert seen["dtype"] == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = grouped_attention(q.double(), k.double(), v.double(), [replace(BASE, rule=rule)], None, 0.3, q_pos, k_pos)
    assert (out.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
