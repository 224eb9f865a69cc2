"""Grouped attention: every form of the Triton kernels equals the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.plans import PLANS, make
from tests.kernels.tools import DTYPES, Place, launching, within_budget
from vlmfix.kernels.dispatch import has_triton, reference_only
from vlmfix.kernels.grouped_attention import pack, reference
from vlmfix.kernels.grouped_attention.parts import group_outputs
from vlmfix.plan import Plan

if has_triton():
    from vlmfix.kernels.grouped_attention import evaluate, tiles

SPLIT = ("grouped_split", "grouped_merge")
FORMS = {"split": (1 << 20, 0), "tiles": (0, 1), "parts": (0, 3)}
"""Most tile rows for the split kernel, and the tile kernel's splits of the keys: whole, or parts that are merged."""


def use(form: str, monkeypatch) -> None:
    """Makes `evaluate` take this form."""
    rows, splits = FORMS[form]
    monkeypatch.setattr(evaluate, "SPLIT_ROWS", rows)
    monkeypatch.setattr(tiles, "_splits", lambda *_: splits)


def compare(place: Place, plans: list[Plan], q, k, v, form: str, monkeypatch, near=None, **kw) -> None:
    """The kernels against the definition in float64 on the same inputs."""
    use(form, monkeypatch)
    queries, keys = q.shape[2], k.shape[2]
    arguments = {
        "mask": None,
        "scale": q.shape[3] ** -0.5,
        "q_pos": place.arange(keys - queries, keys),
        "k_pos": place.arange(keys),
    } | {name: value for name, value in kw.items() if name not in ("spans", "consecutive")}
    extra = {name: value for name, value in kw.items() if name in ("spans", "consecutive")}
    exact = reference.grouped_attention(q.double(), k.double(), v.double(), plans, **_as_mask(arguments, extra, place))
    plain = reference.grouped_attention(q, k, v, plans, **_as_mask(arguments, extra, place))
    with launching("grouped_split" if form == "split" else "grouped_tiles"):
        actual = evaluate.evaluate(q, k, v, plans, **arguments, **extra)
    if near is not None:
        actual, plain, exact = (torch.where(near, 0.0, x) for x in (actual, plain, exact))
    within_budget(actual, plain, exact, q.dtype)


def _as_mask(arguments, extra, place):
    """The definition knows no spans: they become part of its mask."""
    if "spans" not in extra:
        return arguments
    low, high = extra["spans"]
    slots = arguments["k_pos"]
    seen = (slots >= low[..., None]) & (slots < high[..., None])
    if arguments["mask"] is None:
        seen = seen & (slots <= arguments["q_pos"][:, None])
    else:
        seen = seen & arguments["mask"][:, 0]
    return arguments | {"mask": seen[:, None]}


def tensors(place: Place, batch, heads, n_kv, queries, keys, size, dtype=torch.float32, size_v=None):
    return (
        place.randn(batch, heads, queries, size, dtype=dtype),
        place.randn(batch, n_kv, keys, size, dtype=dtype),
        place.randn(batch, n_kv, keys, size_v or size, dtype=dtype),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", PLANS)
def test_every_field_of_a_plan(place, monkeypatch, name, form):
    batch, heads, keys = 2, 4 if form == "split" else 2, place(35, 1003)
    q, k, v = tensors(place, batch, heads, heads // 2, place(2 if form == "split" else 5, 77), keys, 16)
    plans = make(name, place, batch, heads, keys)
    near = near_threshold(plans, q, k, v, place) if name in ("redistribute", "gaze") else None
    compare(place, plans, q, k, v, form, monkeypatch, near, consecutive=True)


def near_threshold(plans, q, k, v, place):
    """[B, H, Q, 1] rows whose masses lie within 1e-2 of a threshold of the rule (all heads where heads are ranked)."""
    seen = []
    plan = dataclasses.replace(plans[0], rule=lambda m: seen.append(m) or torch.ones_like(m))
    queries, keys = q.shape[2], k.shape[2]
    q_pos, k_pos = place.arange(keys - queries, keys), place.arange(keys)
    reference.grouped_attention(q.double(), k.double(), v.double(), [plan], None, q.shape[3] ** -0.5, q_pos, k_pos)
    masses = seen[0]
    if plan.n_groups == 4:
        visual = masses[..., 1] + masses[..., 2]
        near = ((masses[..., 2] / visual - 0.6).abs() < 1e-2) | ((visual - 0.15).abs() < 1e-2)
        return near[..., None]
    half = q.shape[1] // 2
    ranked = masses[..., 1:3].sort(1, descending=True).values
    return ((ranked[:, half - 1] - ranked[:, half]) < 1e-2).any(-1)[:, None, :, None].expand(-1, q.shape[1], -1, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_element_types(place, monkeypatch, dtype, form):
    keys = place(37, 641)
    q, k, v = tensors(place, 1, 4, 2, place(3, 130), keys, 32, dtype)
    for name in ("slopes", "rule"):
        compare(place, make(name, place, 1, 4, keys), q, k, v, form, monkeypatch, consecutive=True)


@pytest.mark.parametrize(
    ("heads", "n_kv", "queries", "keys", "size"),
    [(1, 1, 1, 1, 16), (3, 3, 1, 64, 64), (7, 1, 1, 33, 80), (2, 2, 1, 50, 96), (2, 1, 1, 17, 128), (1, 1, 2, 19, 256)],
)
def test_decode_shapes(place, monkeypatch, heads, n_kv, queries, keys, size):
    for dtype in (torch.float32,) if place.device == "cpu" else DTYPES:
        q, k, v = tensors(place, 2, heads, n_kv, queries, keys, size, dtype)
        compare(place, make("rule", place, 2, heads, keys), q, k, v, "split", monkeypatch, consecutive=True)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_head_sizes(place, monkeypatch, size, dtype):
    if place.device != "cuda":
        pytest.skip("head sizes of the tile kernel run on the GPU")
    q, k, v = tensors(place, 2, 8, 2, 333, 517, size, dtype)
    for name in ("rule", "slopes"):
        compare(place, make(name, place, 2, 8, 517), q, k, v, "tiles", monkeypatch, consecutive=True)


def test_values_of_another_size(place, monkeypatch):
    q, k, v = tensors(place, 1, 2, 2, 2, 21, 32, size_v=16)
    for form in FORMS:
        compare(place, make("rule", place, 1, 2, 21), q, k, v, form, monkeypatch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bool", "float", "spans", "scattered slots"])
def test_masks_left_padding_and_rows_without_keys(place, monkeypatch, kind, form):
    batch, heads, queries, keys = 2, 2, place(6, 200), place(40, 600)
    q, k, v = tensors(place, batch, heads, 1, queries, keys, 16)
    q_pos, k_pos = place.arange(keys - queries, keys), place.arange(keys)
    pad = place.tensor([0, keys - queries + 2])  # the second row's first queries are padding and see nothing
    seen = (k_pos <= q_pos[:, None]) & (k_pos >= pad[:, None, None])
    plans = make("rule", place, batch, heads, keys)
    if kind == "bool":
        compare(place, plans, q, k, v, form, monkeypatch, mask=seen[:, None])
    elif kind == "float":
        added = torch.where(seen, place.randn(batch, queries, keys), torch.finfo(torch.float32).min)[:, None]
        compare(place, plans, q, k, v, form, monkeypatch, mask=added)
    elif kind == "spans":
        spans = pad[:, None].expand(batch, queries), (q_pos + 1)[None]
        spans = spans[0].contiguous(), spans[1].expand(batch, queries).contiguous()
        compare(place, plans, q, k, v, form, monkeypatch, spans=spans, consecutive=True)
        compare(place, make("slopes", place, batch, heads, keys), q, k, v, form, monkeypatch, spans=spans)
    else:
        ring = (k_pos + 7) % keys
        compare(place, plans, q, k, v, form, monkeypatch, k_pos=ring)


@pytest.mark.parametrize("form", FORMS)
def test_sinks_softcap_and_no_causality(place, monkeypatch, form):
    q, k, v = tensors(place, 1, 4, 2, 2, 30, 16)
    for name in ("rule", "nothing"):
        plans = make(name, place, 1, 4, 30)
        compare(place, plans, q, k, v, form, monkeypatch, sinks=place.randn(4), softcap=2.0, causal=False)


@pytest.mark.parametrize("form", FORMS)
def test_statistics(place, monkeypatch, form):
    use(form, monkeypatch)
    batch, heads, queries, keys = 1, 2, 3, 29
    q, k, v = tensors(place, batch, heads, 1, queries, keys, 16)
    for name in ("gaze", "rule"):
        plan = make(name, place, batch, heads, keys)[0]
        got: list[dict[str, torch.Tensor]] = [{}, {}]
        arguments = (None, 0.25, place.arange(keys - queries, keys), place.arange(keys))
        for i, attend in enumerate((reference.grouped_attention, evaluate.evaluate)):
            wanted = dataclasses.replace(plan, statistics=frozenset({"mass", "lse"}), sink=got[i].__setitem__)
            attend(q, k, v, [wanted], *arguments)
        assert got[0].keys() == got[1].keys() == {"mass", "lse"}
        for key in got[0]:
            torch.testing.assert_close(got[1][key], got[0][key], atol=2e-6, rtol=2e-6)


def test_inlined_rule_equals_its_definition(place, monkeypatch):
    """The same plan with the rule hidden behind a lambda takes the generic path."""
    use("split", monkeypatch)
    for name in ("redistribute", "gaze"):
        q, k, v = tensors(place, 1, 6, 2, 1, 41, 16)
        plan = make(name, place, 1, 6, 41)[0]
        rule = plan.rule
        generic = dataclasses.replace(plan, rule=lambda m, rule=rule: rule(m))
        arguments = (None, 0.25, place.tensor([40]), place.arange(41))
        with launching("grouped_masses"):
            slow = evaluate.evaluate(q, k, v, [generic], *arguments)
        torch.testing.assert_close(evaluate.evaluate(q, k, v, [plan], *arguments), slow, atol=1e-6, rtol=1e-5)


def test_long_prefill_runs_in_chunks(place, monkeypatch):
    monkeypatch.setattr(evaluate, "WORKSPACE", 1)
    queries = place(130, 300)
    q, k, v = tensors(place, 1, 1, 1, queries, queries, 16)
    compare(place, make("rule", place, 1, 1, queries), q, k, v, "tiles", monkeypatch, consecutive=True)


def test_programs_take_blocks_one_after_another(place, monkeypatch):
    """Fewer programs than blocks of rows, each with a scratch for the parts that wait for the rule."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda _: 1)
    queries = place(70, 700)
    q, k, v = tensors(place, 2, 2, 1, queries, queries, 16)
    plans = make("redistribute", place, 2, 2, queries)
    compare(place, plans, q, k, v, "tiles", monkeypatch, near_threshold(plans, q, k, v, place), consecutive=True)


@pytest.mark.parametrize(("form", "name"), [("split", "rule"), ("tiles", "redistribute"), ("parts", "slopes")])
def test_compiles_as_one_graph(place, monkeypatch, form, name):
    use(form, monkeypatch)
    q, k, v = tensors(place, 1, 2, 1, 1 if form == "split" else 19, 20, 16)
    plans = make(name, place, 1, 2, 20)
    packed = pack.pack(plans, 2)
    q_pos, k_pos = place.arange(20 - q.shape[2], 20), place.arange(20)

    def step(q):
        return evaluate.evaluate(q, k, v, plans, None, 0.25, q_pos, k_pos, packed=packed) * 2

    backend = "inductor" if place.device == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(q), step(q))


@pytest.mark.gpu
def test_graph_follows_lengths_on_the_device(place):
    """A CUDA graph of one decode step, replayed for a longer sequence."""
    if place.device != "cuda":
        pytest.skip("CUDA graphs")
    batch, heads, keys = 2, 8, 900
    q, k, v = tensors(place, batch, heads, 2, 1, keys, 64, torch.bfloat16)
    plans = make("redistribute", place, batch, heads, 300)
    q_pos, k_pos = place.tensor([299]), place.arange(keys)
    low, high = place.tensor([[0], [5]]), place.tensor([[300], [300]])

    def step():
        return evaluate.evaluate(q, k, v, plans, None, 0.125, q_pos, k_pos, spans=(low, high), consecutive=True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in (300, 777):
        q_pos.fill_(length - 1)
        high.fill_(length)
        graph.replay()
        torch.testing.assert_close(out, step())


@pytest.mark.gpu
def test_long_caches(place, monkeypatch):
    if place.device != "cuda":
        pytest.skip("65,536 keys")
    for keys in (4096, 65536):
        q, k, v = tensors(place, 1, 8, 2, 1, keys, 128, torch.bfloat16)
        compare(place, make("rule", place, 1, 8, keys), q, k, v, "split", monkeypatch, consecutive=True)


@pytest.mark.parametrize("name", ["rule", "slopes", "rolling"])
def test_group_outputs(place, name):
    """Each group's output, and together attention's."""
    q, k, v = tensors(place, 1, 4, 2, 2, 31, 16)
    plan = make(name, place, 1, 4, 31)[0]
    arguments = (None, 0.25, place.arange(29, 31), place.arange(31))
    with reference_only():
        masses, outputs = group_outputs(q, k, v, plan, *arguments)
        whole = reference.grouped_attention(q, k, v, [dataclasses.replace(plan, rule=None)], *arguments)
    torch.testing.assert_close(outputs.sum(3), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(masses.sum(3), torch.ones_like(masses[..., 0]), atol=1e-6, rtol=1e-5)
    with launching("grouped_split", "grouped_masses", "grouped_merge"):
        got = group_outputs(q, k, v, plan, *arguments)
    torch.testing.assert_close(got[0], masses, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got[1], outputs, atol=2e-6, rtol=1e-5)


def test_refusals():
    a = torch.zeros(1, dtype=torch.long)
    groups = torch.zeros(1, 4, dtype=torch.uint8)
    weighted = Plan(groups, 2, a, key_weight=torch.ones(1, 4), rule=lambda m: m)
    assert "key weights" in (pack.unsupported([weighted, weighted]) or "")
    wide = Plan(groups, 5, a, rule=lambda m: m)
    assert "joint groups" in (pack.unsupported([wide, wide]) or "")
    assert pack.unsupported([weighted, wide]) is None
