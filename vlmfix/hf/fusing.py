"""Norms and gated layers of a decoder in one launch each, for as long as a step is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.hf.parts import Parts
from vlmfix.kernels.rms_norm import rms_norm
from vlmfix.kernels.silu_mul import silu_mul

Forward = Callable[[Tensor], Tensor]


class Fused:
    """Fused forms of those modules of a decoder whose results they are found to equal.

    Whether a module is one of these is tried out on random numbers, since classes of one name differ in details.

    Args:
        parts: the model.
    """

    def __init__(self, parts: Parts) -> None:
        self.forwards: dict[nn.Module, Forward] = {}
        for module in parts.decoder.modules():
            form = _norm(module) or _gated(module)
            if form is not None and "forward" not in vars(module) and not _hooked(module):
                width, like, forward = form
                if _equal(module, forward, width, like):
                    self.forwards[module] = forward

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block these modules run in their fused form."""
        modules: dict[Any, Forward] = self.forwards  # type: ignore[assignment]
        try:
            for module, forward in modules.items():
                module.forward = forward
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _norm(module: nn.Module) -> tuple[int, Tensor, Forward] | None:
    """Width, a tensor of its dtype and device, and fused form of what could be a root-mean-square norm."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, module.weight, eps)  # type: ignore[arg-type]

    return weight.shape[0], weight, forward


def _gated(module: nn.Module) -> tuple[int, Tensor, Forward] | None:
    """The same of what could be a layer gated by silu."""
    gate, up, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not all(isinstance(layer, nn.Linear) for layer in (gate, up, down)):
        return None
    layers: tuple[Any, ...] = (gate, up, down)

    def forward(x: Tensor) -> Tensor:
        gate, up, down = layers
        out: Tensor = down(silu_mul(gate(x), up(x)))
        return out

    return layers[0].in_features, layers[0].weight, forward


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@torch.no_grad()
def _equal(module: nn.Module, forward: Forward, width: int, like: Tensor) -> bool:
    """Whether both forms give the same up to a rounding or two."""
    if not like.is_floating_point() or like.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, width, generator=generator).to(like.device, like.dtype)
    try:
        want, got = module(x), forward(x)
    except Exception:  # some other kind of module, which takes other arguments
        return False
    if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    scale = want.abs().amax().clamp(min=1e-20)
    return bool(((want - got).abs().amax() <= 4 * torch.finfo(want.dtype).eps * scale).all())
