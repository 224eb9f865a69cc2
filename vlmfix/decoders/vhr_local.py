"""VHR by the direct effect of the picture in a layer: one pass, nothing run twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.groups import at_slots, last_prompt_row
from vlmfix.decoders.vhr import diverging, surging
from vlmfix.method import (
    AttentionMethod,
    Glance,
    LayerContext,
    LayerSpec,
    Method,
    ModelFacts,
    check_range,
    resolve_layers,
)
from vlmfix.plan import Plan


@dataclass(frozen=True)
class VHRLocal(AttentionMethod):
    """Vision-aware Head Reinforcement without the prompt without pictures; experimental, and ours.

    The divergence of a head is m ||o_V - o_T||: m the attention its last prompt token pays to pictures, o_V and o_T
    what it reads from visual and from other keys alone. In layer 0 that is the divergence of "Cracking the Code of
    Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, up to positions; deeper it leaves out
    what other tokens already took from the picture, and need not rank heads alike.

    Args:
        alpha: factor of the chosen heads; 1 is neutral.
        layers: fractions of depth, or exact indices.
        second_layer: whether layer 1 is reinforced as well.
        outliers: whether heads that would say more without the picture are left out.
    """

    watches_steps: ClassVar[bool] = False

    alpha: float = 2.0
    layers: LayerSpec = (0.5625, 1.0)
    second_layer: bool = True
    outliers: bool = True

    def neutral(self) -> bool:
        """Factor one."""
        return self.alpha == 1

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the range."""
        check_range(self, "alpha", 0, 100)
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers, and the second if wanted."""
        layers = set(resolve_layers(self.layers, depth))
        return tuple(sorted(layers | ({1} if self.second_layer and depth > 1 else set())))

    def watches(self, depth: int) -> tuple[int, ...]:
        """Its own layers."""
        return self.acts_on(depth)

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Chooses the heads of a layer, once."""
        memory = glance.context.memory
        if "scale" not in memory:
            row = last_prompt_row(glance, "vhr_local")
            divergence, activation, _ = local_divergence(glance, row)
            if self.outliers:
                divergence = divergence.masked_fill(surging(divergence, activation), 0.0)
            memory["scale"] = torch.where(diverging(divergence), self.alpha, 1.0)
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """Nothing but a scale per head."""
        layout = context.layout
        none = torch.zeros_like(layout.kinds)
        return Plan(none, 1, torch.zeros_like(layout.last), head_scale=context.memory["scale"])


def local_divergence(glance: Glance, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The picture's direct effect on one attention row, all [B, H] float32.

    Args:
        glance: the layer.
        row: [B, H, K] the row.

    Returns:
        m ||o_V - o_T||, ||o_T||^2 and m.
    """
    visual = row * at_slots(glance.context.layout.visual, glance.k_pos)[:, None]
    value = glance.value.float()
    parts = torch.stack([visual, row - visual]).unflatten(2, (value.shape[1], -1))
    read = torch.einsum("pbgrk,bgkd->pbgrd", parts, value).flatten(2, 3)
    masses = torch.stack([visual.sum(-1), (row - visual).sum(-1)])
    seen, rest = read / masses.clamp(min=torch.finfo(masses.dtype).tiny)[..., None]
    return masses[0] * (seen - rest).norm(dim=-1), rest.square().sum(-1), masses[0]
