"""Cases of `benchmarks/kernels.py`: grouped attention, with inputs, checks, baselines, ideal bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vlmfix.kernels.grouped_attention import reference as grouped_reference
from vlmfix.kernels.grouped_attention.evaluate import evaluate
from vlmfix.kernels.rules import FusedRule
from vlmfix.plan import Plan

Inputs = dict[str, Any]
DEVICE = "cuda"
L2 = 256 << 20
"""Bytes that the sets of inputs of one case exceed, so that no cache serves them."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Args:
        name: what it is.
        inputs: makes one set of inputs.
        ours: the operation.
        check: error on one set of inputs as a share of its budget.
        bytes: bytes an ideal kernel moves.
        flops: operations it cannot avoid.
        sets: sets of inputs to rotate among.
        baselines: name -> makes a function of the inputs.
        target: what we want.
    """

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[[Inputs], Any]
    check: Callable[[Inputs], float]
    bytes: float
    flops: float
    sets: int
    baselines: dict[str, Callable[[Inputs], Callable[[Inputs], Any]]] = field(default_factory=dict)
    target: str = ""


def share_of_budget(actual: Tensor, plain: Tensor, exact: Tensor, rounding: torch.dtype) -> float:
    """Error over (twice the PyTorch form's error plus one rounding), against float64."""
    if actual.isnan().any() or not torch.equal(actual.isinf(), exact.isinf()):
        return float("inf")
    actual, plain, exact = (torch.where(exact.isinf(), 0.0, x.double()) for x in (actual, plain, exact))
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(rounding).eps * exact.abs().max()
    return float((actual - exact).abs().max() / allowed)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def attention_inputs(batch: int, heads: int, n_kv: int, rows: int, keys: int, size: int, kind: str) -> Inputs:
    """Queries, a cache, and a plan over contiguous groups: system, 576 visual keys or half the prompt, question."""
    groups = torch.zeros(batch, keys, dtype=torch.uint8, device=DEVICE)
    visual = min(576, keys // 2)
    groups[:, 35 : 35 + visual] = 1
    first = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    if kind == "slopes":
        plan = Plan(groups, 2, first, slope_pos=torch.tensor([[[1.0, 1.5]]], device=DEVICE))
    elif kind == "gaze":
        groups[:, 35 + visual :] = 2
        weight = torch.where(groups == 1, 2.0, 0.0)
        rule = FusedRule("gaze", torch.tensor([[heads // 2, 1e9]], device=DEVICE).repeat(batch, 1))
        plan = Plan(groups, 3, first, key_weight=weight, rule=rule)
    else:
        if kind == "sinks":  # scattered keys of two more groups
            groups[:, 60:600:60] = 2
            groups[:, 0] = 3
        else:
            groups[:, 35 + visual - 64 : 35 + visual] = 2
        arguments = torch.tensor([[0.9, 0.05, 0.4, visual, 5.0]], device=DEVICE).repeat(batch, 1)
        plan = Plan(groups, 4, first, rule=FusedRule("redistribute", arguments))
    return {
        "q": random(batch, heads, rows, size),
        "k": random(batch, n_kv, keys, size),
        "v": random(batch, n_kv, keys, size),
        "plans": [plan],
        "q_pos": torch.arange(keys - rows, keys, device=DEVICE),
        "k_pos": torch.arange(keys, device=DEVICE),
    }


def grouped(x: Inputs) -> Tensor:
    """Grouped attention on the kernels."""
    scale = x["q"].shape[3] ** -0.5
    return evaluate(x["q"], x["k"], x["v"], x["plans"], None, scale, x["q_pos"], x["k_pos"], consecutive=True)


def check_grouped(x: Inputs) -> float:
    """On the first row's first heads (all for rules that pool) and up to 96 of its queries, against float64."""
    out = grouped(x)
    plan = x["plans"][0]
    shared = x["q"].shape[1] // x["k"].shape[1]
    pooled = isinstance(plan.rule, FusedRule) and plan.rule.pools_heads
    n_kv = x["k"].shape[1] if pooled else 1
    rows = torch.linspace(0, x["q"].shape[2] - 1, min(96, x["q"].shape[2]), device=DEVICE).long()
    parts = {name: getattr(plan, name)[:1] for name in ("groups", "active_from")}
    parts["key_weight"] = None if plan.key_weight is None else plan.key_weight[:1]
    parts["rule"] = None if plan.rule is None else FusedRule(plan.rule.name, plan.rule.arguments[:1])
    one = Plan(**(vars(plan) | parts))
    q, k, v = x["q"][:1, : n_kv * shared, rows], x["k"][:1, :n_kv], x["v"][:1, :n_kv]
    rest = ([one], None, q.shape[3] ** -0.5, x["q_pos"][rows], x["k_pos"])
    plain = grouped_reference.grouped_attention(q, k, v, *rest)
    exact = grouped_reference.grouped_attention(q.double(), k.double(), v.double(), *rest)
    return share_of_budget(out[:1, : n_kv * shared, rows], plain, exact, q.dtype)


def flash(x: Inputs, causal: bool) -> Tensor:
    """The vendor's flash attention through torch, without any plan."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=causal, enable_gqa=True)


def flex(x: Inputs, causal: bool) -> Callable[[Inputs], Any]:
    """Compiled FlexAttention with the plan's slopes if it has any; it cannot express a factor rule."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # dynamo counts the shapes of all cases, and beyond eight runs the rest uncompiled
    plan, keys, rows = x["plans"][0], x["k"].shape[2], x["q"].shape[2]
    attend = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, keys, device=DEVICE) if causal else None
    score = None
    if plan.slope_pos is not None:
        groups, slopes = plan.groups.int(), plan.slope_pos[0, 0]

        def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return s * slopes[groups[b, k]]

    gqa = x["q"].shape[1] != x["k"].shape[1]
    return lambda y: attend(y["q"], y["k"], y["v"], score_mod=score, block_mask=mask, enable_gqa=gqa)


def attention(name: str, batch: int, heads: int, n_kv: int, rows: int, keys: int, kind: str, target: str = "") -> Case:
    """A case of grouped attention; operations are those of the visible half if every row is a query."""
    size = 128
    causal = rows == keys
    cache = 2 * batch * n_kv * keys * size * 2
    moved = cache + 2 * batch * heads * rows * size * 2
    return Case(
        name,
        partial(attention_inputs, batch, heads, n_kv, rows, keys, size, kind),
        grouped,
        check_grouped,
        moved,
        4 * batch * heads * rows * keys * size / (2 if causal else 1),
        max(1, min(24, L2 // moved)),
        {"sdpa": lambda x: partial(flash, causal=causal), "flex": partial(flex, causal=causal)},
        target,
    )


ATTENTION = [
    attention("decode B=1 32/32 K=640", 1, 32, 32, 1, 640, "sinks", "<= 1.1 x sdpa"),
    attention("decode B=1 32/32 K=640 slopes", 1, 32, 32, 1, 640, "slopes", "<= 1.1 x sdpa"),
    attention("decode B=1 32/32 K=640 gaze", 1, 32, 32, 1, 640, "gaze"),
    attention("decode B=1 28/4 K=640", 1, 28, 4, 1, 640, "sinks", "<= 1.1 x sdpa"),
    attention("decode B=16 32/32 K=640", 16, 32, 32, 1, 640, "sinks"),
    attention("decode B=8 32/32 K=4096", 8, 32, 32, 1, 4096, "sinks", ">= 80% of ideal"),
    attention("decode B=8 32/8 K=4096", 8, 32, 8, 1, 4096, "sinks", ">= 70% of ideal"),
    attention("decode B=1 32/8 K=65536", 1, 32, 8, 1, 65536, "sinks"),
    attention("rows 64 B=1 32/32 K=4096", 1, 32, 32, 64, 4096, "sinks", "<= 1.5 x sdpa"),
    attention("rows 64 B=1 28/4 K=640", 1, 28, 4, 64, 640, "sinks"),
    attention("prefill B=4 32/32 4096", 4, 32, 32, 4096, 4096, "contiguous", "<= 1.43 x sdpa"),
    attention("prefill B=4 32/32 4096 slopes", 4, 32, 32, 4096, 4096, "slopes", "<= 1.43 x sdpa"),
    attention("prefill B=1 28/4 640", 1, 28, 4, 640, 640, "sinks"),
]
"""Grouped attention."""
