"""VAF: scores of visual keys scaled up and those of the system prompt down, in the layers where the two fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.decoders.groups import last_prompt_row, per_group, upper_half, visual_mass
from vlmfix.errors import UsageError
from vlmfix.layout import Kind
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

REST, VISUAL, SYSTEM = range(3)


@dataclass(frozen=True)
class VAF(AttentionMethod):
    """Visual Amplification Fusion.

    "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language Models",
    arXiv 2503.13107: for tokens after the pictures, z_j <- (1 + alpha) z_j for visual keys and z_j <- (1 - beta) z_j
    for everything before the first picture, the first token included. Negative scores of visual keys fall, so this is
    a temperature within the group and not always a gain.

    Args:
        alpha: amplification of visual keys; the released script uses 0.15.
        beta: suppression of the keys before the pictures; the released script uses 0.05.
        heads: "all", as released, or "visual": only the half of a layer's heads in which the last prompt token looks
            most at the pictures (the paper restricts the method to visual perception heads; the choice per prompt is
            ours).
        layers: fractions of depth, or exact indices; published are layers 9 to 14 of 32.
    """

    scales_scores: ClassVar[bool] = True
    watches_steps: ClassVar[bool] = False
    prefix_plain: ClassVar[bool] = True

    alpha: float = 0.15
    beta: float = 0.05
    heads: Literal["all", "visual"] = "all"
    layers: LayerSpec = (0.28125, 0.46875)

    def neutral(self) -> bool:
        """Neither amplification nor suppression."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "alpha", 0, 10)
        check_range(self, "beta", 0, 1)
        if self.heads not in ("all", "visual"):
            raise UsageError(f"vaf(heads={self.heads!r}): give 'all' or 'visual'")
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers."""
        return resolve_layers(self.layers, depth)

    def watches(self, depth: int) -> tuple[int, ...]:
        """Its own layers, where heads are chosen."""
        return self.acts_on(depth) if self.heads == "visual" else ()

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Chooses the heads of a layer, once."""
        memory = glance.context.memory
        if "chosen" not in memory:
            row = last_prompt_row(glance, "vaf(heads='visual')")
            memory["chosen"] = upper_half(visual_mass(glance, row))
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """One slope for visual and one for system keys, on rows after the pictures."""
        layout = context.layout
        groups = torch.where(layout.visual, VISUAL, REST)
        groups = torch.where(layout.kinds == Kind.SYSTEM, SYSTEM, groups).to(torch.uint8)
        slope = per_group((1, 1 + self.alpha, 1 - self.beta), layout.kinds)
        if self.heads == "visual":
            slope = torch.where(context.memory["chosen"][:, :, None], slope, 1.0)
        return Plan(groups, 3, active_from=layout.after_visual, slope_pos=slope)
