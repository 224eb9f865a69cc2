"""VHR: heads whose output depends on the picture are reinforced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.method import AttentionMethod, LayerContext, LayerSpec, Method, ModelFacts, check_range, resolve_layers
from vlmfix.plan import Plan
from vlmfix.view import View
from vlmfix.views.text import WithoutPictures


@dataclass(frozen=True)
class VHR(AttentionMethod):
    """Vision-aware Head Reinforcement.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, eq. 4 to 7. In
    the prefill the last prompt token's head outputs are compared with those of the same prompt without pictures; from
    the lowest chosen layer up, lower layers being reinforced already, the more divergent half of a layer's heads is
    multiplied by alpha, at every position of the prompt and of the answer. Heads stay chosen for the whole generation.
    Written after the paper; its code could not be had.

    Args:
        alpha: factor of the chosen heads; 1 is neutral. Published: 2.
        layers: fractions of depth, or exact indices; published are the last 14 of 32.
        second_layer: whether layer 1 is reinforced as well, as the paper does for LLaVA; it can be unstable.
        outliers: whether heads whose activation surges without the picture are left out, as the paper says.
        reinforce_text: whether the prompt without pictures runs through the reinforced heads too; the paper does not
            say. Without, it needs rows of its own in the prefill.
    """

    alpha: float = 2.0
    layers: LayerSpec = (0.5625, 1.0)
    second_layer: bool = True
    outliers: bool = True
    reinforce_text: bool = True

    def neutral(self) -> bool:
        """Factor one."""
        return self.alpha == 1

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges.

        Raises:
            Refusal: the prompt cannot be run without its pictures in the same forward.
        """
        check_range(self, "alpha", 0, 100)
        if self.on != "visible":
            raise UsageError(f"vhr(on={self.on!r}): heads are chosen from the caller's own rows; leave 'visible'")
        if facts.unbranched:
            raise Refusal(f"vhr compares the prompt with and without pictures; {facts.family}: {facts.unbranched}")
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers, and the second if wanted."""
        layers = set(resolve_layers(self.layers, depth))
        return tuple(sorted(layers | ({1} if self.second_layer and depth > 1 else set())))

    def without_pictures(self) -> View | None:
        """Visual tokens and what frames them are left out."""
        return WithoutPictures()

    @property
    def scales_text(self) -> bool:
        """As set."""
        return self.reinforce_text

    def plan(self, context: LayerContext) -> Plan | None:
        """Nothing but a scale per head, chosen by divergence."""
        layout = context.layout
        none = torch.zeros_like(layout.kinds)
        return Plan(none, 1, torch.zeros_like(layout.last), head_rule=Reinforce(self.alpha, self.outliers))


@dataclass(frozen=True)
class Reinforce:
    """The scale of each head.

    Args:
        alpha: scale of the chosen heads.
        outliers: whether outliers are left out.
    """

    alpha: float
    outliers: bool = True

    def __call__(self, seeing: Tensor, blind: Tensor) -> Tensor:
        """Head outputs [B, H, D] with and without pictures -> [B, H] float32."""
        divergence, activation = (seeing.float() - blind.float()).norm(dim=-1), blind.float().square().sum(-1)
        if self.outliers:
            divergence = divergence.masked_fill(surging(divergence, activation), 0.0)
        return torch.where(diverging(divergence), self.alpha, 1.0)


def surging(divergence: Tensor, activation: Tensor) -> Tensor:
    """[B, H] True for outliers: divergence and activation both above mean + standard deviation of the layer's heads.

    Args:
        divergence: [B, H] distance of the head's outputs with and without pictures, eq. 4.
        activation: [B, H] squared norm of the output without pictures, eq. 6.
    """
    if divergence.shape[-1] == 1:
        return torch.zeros_like(divergence, dtype=torch.bool)
    high = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) for x in (divergence, activation)]
    return high[0] & high[1]


def diverging(divergence: Tensor) -> Tensor:
    """[B, H] True above the median of the layer's heads, eq. 7."""
    return divergence > divergence.median(-1, keepdim=True).values
