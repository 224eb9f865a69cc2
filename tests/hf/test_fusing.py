"""Norms and gated layers are replaced where they are what they seem, and only for a while."""

import pytest
import torch
from torch import nn

from vlmfix.hf import hooks
from vlmfix.hf.fusing import Fused

from ..families import build


def fused(family):
    model = build(family, fresh=True).model
    with hooks.installed(model) as parts:
        return parts, Fused(parts)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "internvl", "mistral3"])
def test_all_norms_and_gated_layers_of_a_decoder_are_found(family):
    parts, found = fused(family)
    names = [type(module).__name__ for module in found.forwards]
    assert sum("Norm" in name for name in names) == 2 * parts.depth + 1
    assert sum("MLP" in name for name in names) == parts.depth
    x = torch.randn(2, 1, parts.hidden_size)
    for module in found.forwards:
        plain = module(x)
        with found.applied():
            torch.testing.assert_close(module(x), plain)
            assert "forward" in vars(module)
        assert "forward" not in vars(module)


def test_what_only_looks_like_one_is_left_alone():
    parts, found = fused("gemma3")  # its norms scale by one plus the weight, its gate is gelu
    assert not any("MLP" in type(module).__name__ for module in found.forwards)
    for norm in parts.decoder.modules():
        if norm in found.forwards:
            x = torch.randn(1, 1, norm.weight.shape[0])
            assert torch.allclose(norm(x), found.forwards[norm](x), atol=1e-5)


def test_modules_with_hooks_of_others_stay():
    model = build("llava", fresh=True).model
    with hooks.installed(model) as parts:
        parts.decoder.norm.register_forward_hook(lambda *args: None)
        found = Fused(parts)
    assert parts.decoder.norm not in found.forwards
    assert found.forwards


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
