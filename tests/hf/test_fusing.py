"""Layers are replaced where they are what they seem, and only for a while."""

from collections import Counter

import pytest
import torch
from torch import nn

from vlmfix.hf import fusing, hooks
from vlmfix.hf.fusing import Fused

from ..families import build


def fused(family):
    model = build(family, fresh=True).model
    with hooks.installed(model) as parts:
        return parts, Fused(parts)


FAMILIES = ["llava", "qwen2_5_vl", "idefics3", "internvl", "mistral3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_a_decoder_are_found(family):
    parts, found = fused(family)
    names = [type(module).__name__ for module in found.forwards]
    assert sum("Norm" in name for name in names) == 2 * parts.depth + 1
    assert sum("MLP" in name for name in names) == parts.depth
    assert sum("Attention" in name for name in names) == parts.depth
    assert names.count("Linear") == 7 * parts.depth
    assert not found.products.keys() & found.others.keys()
    x = torch.randn(2, 1, parts.hidden_size)
    for module in found.forwards:
        if "Attention" in type(module).__name__ or getattr(module, "in_features", len(x[0, 0])) != len(x[0, 0]):
            continue
        plain = module(x)
        with found.applied():
            torch.testing.assert_close(module(x), plain)
            assert "forward" in vars(module)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_gives_the_same(family, monkeypatch):
    tiny = build(family, fresh=True)
    counts = Counter()

    def counting(name):
        plain = getattr(fusing, name)
        monkeypatch.setattr(fusing, name, lambda *args: (counts.update([name]), plain(*args))[1])

    with hooks.installed(tiny.model) as parts:
        found = Fused(parts)
        x = torch.randn(2, 3, parts.hidden_size)
        want = parts.decoder(inputs_embeds=x).last_hidden_state
        for name in ("linears", "gated_linear", "rms_norm", "rotary"):
            counting(name)
        with found.applied():
            got = parts.decoder(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(got, want)
    # projections in one, the output, the gated layer's last
    assert counts == {
        "linears": 3 * parts.depth,
        "gated_linear": parts.depth,
        "rms_norm": 2 * parts.depth + 1,
        "rotary": parts.depth,
    }


def test_products_alone():
    parts, found = fused("llava")
    with found.applied(products=True):
        changed = {module for module in parts.decoder.modules() if "forward" in vars(module)}
    assert changed == set(found.products)


def test_what_only_looks_like_one_is_left_alone():
    parts, found = fused("gemma3")  # its norms scale by one plus the weight, its gate is gelu
    assert not any("MLP" in type(module).__name__ for module in found.forwards)
    for norm in parts.decoder.modules():
        if norm in found.others and hasattr(norm, "weight"):
            x = torch.randn(1, 1, norm.weight.shape[0])
            assert torch.allclose(norm(x), found.forwards[norm](x), atol=1e-5)


class Lookalike(nn.Module):
    """What differs from a root-mean-square norm by less than roundings of random numbers of size one."""

    def __init__(self, kind, width, dtype):
        super().__init__()
        self.kind, self.eps = kind, 1e-5
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x):
        wide = x.float()
        if self.kind == "centred":
            wide = wide - wide.mean(-1, keepdim=True)
        square = wide.square().mean(-1, keepdim=True)
        root = square.sqrt() + self.eps if self.kind == "eps outside" else (square + self.eps).sqrt()
        return self.weight * (wide / root).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_that_differ_by_little_on_random_numbers(dtype):
    known = {kind: fusing._norm(Lookalike(kind, 4096, dtype)) is not None for kind in ("", "centred", "eps outside")}
    assert known == {"": True, "centred": False, "eps outside": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_that_differ_by_little_on_small_numbers(dtype):
    class Gated(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act = act
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(256, 256, bias=False) for _ in range(3))

        def forward(self, x):
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

    acts = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "clamped": lambda g: nn.functional.silu(g.clamp(max=7)),
    }
    torch.manual_seed(0)
    layers = {name: Gated(act) for name, act in acts.items()}
    for layer in layers.values():
        nn.init.normal_(layer.gate_proj.weight, std=0.08)
    assert {k for k, layer in layers.items() if fusing._gated(layer.to(dtype)) is not None} == {"silu"}


def test_another_rotary_embedding_is_left_alone(monkeypatch):
    def interleaved(q, k, cos, sin, unsqueeze_dim=1):
        def turned(x):
            return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + turned(q) * sin, k * cos + turned(k) * sin

    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, fusing.ROTARY, interleaved)
    parts, found = fused("llava")
    assert not any("Attention" in type(module).__name__ for module in found.forwards)
    assert len(found.products) == 8 * parts.depth


def test_projections_with_different_inputs_run_one_by_one():
    parts, found = fused("llava")
    attention = parts.blocks[0].self_attn
    x, y = (torch.randn(1, 1, parts.hidden_size) for _ in range(2))
    want = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(y), attention.q_proj(y)]
    with found.applied():
        got = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(y), attention.q_proj(y)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_projections_that_nobody_asks_for_are_not_computed_again(monkeypatch):
    parts, found = fused("llava")
    attention, x = parts.blocks[0].self_attn, torch.randn(1, 1, parts.hidden_size)
    asked = []
    plain = fusing.linears
    monkeypatch.setattr(
        fusing, "linears", lambda x, weights, biases: (asked.append(len(weights)), plain(x, weights, biases))[1]
    )
    for _ in range(2):
        with found.applied():
            attention.q_proj(x)
    assert asked == [3, 1]


def test_changed_weights_count():
    parts, found = fused("llava")
    layer, x = parts.blocks[0].self_attn.q_proj, torch.randn(1, 1, parts.hidden_size)
    with torch.no_grad():
        layer.weight.mul_(2)
    want = layer(x)
    with found.applied():
        torch.testing.assert_close(layer(x), want)


def test_layers_that_are_more_than_products_run_as_they_are():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = build("llava", fresh=True).model
    with hooks.installed(model) as parts:
        attention, mlp = parts.blocks[0].self_attn, parts.blocks[0].mlp
        attention.k_proj.__class__ = Scaled
        mlp.up_proj.__class__ = Scaled
        found = Fused(parts)
        assert not {attention.k_proj, mlp.up_proj} & set(found.products)
        assert {attention.q_proj, mlp.gate_proj} <= set(found.products)
        x = torch.randn(1, 2, parts.hidden_size)
        want = parts.decoder(inputs_embeds=x).last_hidden_state
        with found.applied():
            torch.testing.assert_close(parts.decoder(inputs_embeds=x).last_hidden_state, want)


def test_hooks_of_others_run_around_the_fused_forms():
    tiny = build("llava", fresh=True)
    with hooks.installed(tiny.model) as parts:
        block, x = parts.blocks[0], torch.randn(1, 2, parts.hidden_size)
        modules = [block.self_attn, block.self_attn.k_proj, block.input_layernorm, block.mlp, block.mlp.up_proj]
        called = []
        for module in modules:
            module.register_forward_hook(lambda module, *_: called.append(module))
        found = Fused(parts)
        called.clear()
        want = parts.decoder(inputs_embeds=x).last_hidden_state
        plain = called.copy()
        with found.applied():
            torch.testing.assert_close(parts.decoder(inputs_embeds=x).last_hidden_state, want)
    assert set(plain) == set(modules)
    assert called == 2 * plain
    assert {*modules} <= found.forwards.keys()


def test_attentions_once_asked_for_cost_no_fused_form():
    tiny = build("llava", fresh=True)
    with hooks.installed(tiny.model) as parts:
        before = len(Fused(parts).forwards)
    tiny.model.set_attn_implementation("eager")
    tiny.model.generate(**tiny.inputs((1,)), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    tiny.model.set_attn_implementation("sdpa")
    with hooks.installed(tiny.model) as parts:
        assert len(Fused(parts).forwards) == before


def test_forwards_come_back_after_an_error():
    _, found = fused("llava")
    with pytest.raises(RuntimeError, match="inside"), found.applied():
        raise RuntimeError("inside")
    assert not any("forward" in vars(module) for module in found.forwards)


def test_other_modules_with_a_weight_and_an_eps():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-5

        def forward(self, x, y):
            return x + y

    model = build("llava", fresh=True).model
    model.model.language_model.extra = Other()
    with hooks.installed(model) as parts:
        assert model.model.language_model.extra not in Fused(parts).forwards


def test_forwards_of_others_are_kept():
    model = build("llava", fresh=True).model
    with hooks.installed(model) as parts:
        found, norm = Fused(parts), parts.decoder.norm
        norm.forward = lambda x: x
        with found.applied():
            assert norm(1) == 1
    assert norm(1) == 1


def test_projections_of_other_inputs_run_by_themselves():
    model = build("llava", fresh=True).model
    with hooks.installed(model) as parts:
        attention = parts.blocks[0].self_attn
        attention.k_proj = nn.Linear(3, 5)
        found = Fused(parts)
        with found.applied():
            attention.q_proj(torch.randn(1, 1, parts.hidden_size))
            attention.k_proj(torch.randn(1, 1, 3))


def test_angles_of_another_type_are_the_models_business(monkeypatch):
    """As in OLMo: angles in float32, results in the queries' type."""
    from transformers.models.llama import modeling_llama

    plain = getattr(modeling_llama, fusing.ROTARY)

    def theirs(q, k, cos, sin):
        return tuple(x.to(q.dtype) for x in plain(q, k, cos, sin))

    monkeypatch.setattr(modeling_llama, fusing.ROTARY, theirs)
    model = build("llava", fresh=True).model.bfloat16()
    with hooks.installed(model) as parts:
        attention = parts.blocks[0].self_attn
        ours = Fused(parts).forwards[attention].__func__.__globals__[fusing.ROTARY]
    q, k, cos, sin = (torch.randn(1, *n, 16) for n in ((4, 1), (2, 1), (1,), (1,)))
    assert [x.dtype for x in ours(q.bfloat16(), k.bfloat16(), cos, sin)] == [torch.bfloat16] * 2
