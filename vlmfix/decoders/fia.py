"""FIA: scores raised on two small sets of visual tokens that the vision tower's class token singles out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.decoders.groups import MAGNITUDE, last_prompt_row, visual_mass
from vlmfix.errors import Refusal, UsageError
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

REST, LOCAL, SUMMARY = range(3)
FENCE = 1.5
"""Interquartile ranges above the upper quartile beyond which a token is an outlier."""


@dataclass(frozen=True)
class FIA(AttentionMethod):
    """Dual-stream token selection and amplification, also published as PAINT.

    "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model", arXiv 2501.12206.
    Local tokens are those the class token attends to most in the tower's first layer, summary tokens the outliers of
    its last but one layer, picture by picture. For the token being generated z_j <- z_j + a |z_j| with a = alpha on
    local and a = beta on summary tokens. The paper scales the strength by the head's visual sensitivity without a
    formula we could read; here it is the attention the last prompt token pays to pictures, relative to the layer's
    most visual head, and that reading is ours. Captions degenerate at published strengths: watch length and repetition.

    Args:
        alpha: share of its magnitude by which the score of a local token rises.
        beta: the same for summary tokens.
        local_share: share of a picture's tokens that are local.
        head_sensitivity: whether strength follows the head's visual sensitivity; the released code treats heads alike.
        prompt_row: whether the last prompt token is changed too; the released code with contrast leaves it alone.
        layers: fractions of depth, or exact indices.
        variant: "paper", or "reference": heads alike, and the number of outliers rounded as in the released code.
    """

    scales_scores: ClassVar[bool] = True
    watches_steps: ClassVar[bool] = False
    vision_layers: ClassVar[tuple[int, ...]] = (0, -2)

    alpha: float = 0.7
    beta: float = 0.4
    local_share: float = 0.25
    head_sensitivity: bool = True
    prompt_row: bool = True
    layers: LayerSpec = (0.0625, 1.0)
    variant: Literal["paper", "reference"] = "paper"

    def neutral(self) -> bool:
        """Neither set is raised."""
        return (self.alpha == 0 or self.local_share == 0) and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges.

        Raises:
            Refusal: the tower has no class token, or its patches are not the visual tokens.
        """
        check_range(self, "alpha", 0, MAGNITUDE)
        check_range(self, "beta", 0, MAGNITUDE)
        check_range(self, "local_share", 0, 1)
        if self.variant not in ("paper", "reference"):
            raise UsageError(f"fia(variant={self.variant!r}): give 'paper' or 'reference'")
        if not facts.class_attention:
            raise Refusal(
                "fia selects visual tokens by the attention of the vision tower's class token; "
                f"{facts.family} has no class token, or merges patches into other tokens; use pai there"
            )
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers."""
        return resolve_layers(self.layers, depth)

    def watches(self, depth: int) -> tuple[int, ...]:
        """Its own layers, where strength follows the heads."""
        return self.acts_on(depth) if self._sensitive else ()

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Measures the heads of a layer, once."""
        memory = glance.context.memory
        if "sensitivity" not in memory:
            mass = visual_mass(glance, last_prompt_row(glance, "fia(head_sensitivity=True)"))
            memory["sensitivity"] = mass / mass.amax(-1, keepdim=True).clamp(min=1e-12)
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """Local and summary tokens get slopes of their own."""
        layout = context.layout
        groups = self._groups(context)
        strength = torch.tensor([0.0, self.alpha, self.beta], device=groups.device)[None, None]
        if self._sensitive:
            strength = strength * context.memory["sensitivity"][:, :, None]
        start = layout.last + (0 if self.prompt_row else 1)
        return Plan(groups, 3, active_from=start, slope_pos=1 + strength, slope_neg=1 - strength)

    @property
    def _sensitive(self) -> bool:
        return self.head_sensitivity and self.variant == "paper"

    def _groups(self, context: LayerContext) -> Tensor:
        """[B, K] REST, LOCAL or SUMMARY; chosen once for all layers."""
        if "groups" not in context.notes:
            first, late = (context.seen[layer] for layer in self.vision_layers)
            images = context.layout.images
            groups = torch.zeros_like(context.layout.kinds)
            for row in range(len(groups)):
                for picture in range(int(images[row].max()) + 1):
                    at = (images[row] == picture) & first[row].isfinite()
                    local, summary = select(
                        first[row, at], late[row, at], self.local_share, self.variant == "reference"
                    )
                    groups[row, at] = (local * LOCAL + summary * SUMMARY).to(groups.dtype)
            context.notes["groups"] = groups
        return context.notes["groups"]


def select(first: Tensor, late: Tensor, local_share: float, truncated: bool = False) -> tuple[Tensor, Tensor]:
    """The two sets of one picture's tokens, disjoint.

    Args:
        first: [N] class-token attention to each token in the tower's first layer, summed over heads.
        late: [N] the same in its last but one layer.
        local_share: share of local tokens.
        truncated: whether the number of summary tokens is floor(N * (count / N)) in floating point, as released, which
            can lose one.

    Returns:
        [N] bool local, [N] bool summary.
    """
    tokens = len(first)
    summary = late > upper_fence(late)
    if truncated:
        count = int(tokens * (int(summary.sum()) / tokens))
        summary = largest(late, count)
    return largest(first, int(tokens * local_share)) & ~summary, summary


def upper_fence(values: Tensor) -> Tensor:
    """Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation."""
    low, high = torch.quantile(values.float(), torch.tensor([0.25, 0.75], device=values.device))
    fence: Tensor = high + FENCE * (high - low)
    return fence


def largest(values: Tensor, count: int) -> Tensor:
    """[N] True for the `count` largest values, the lower index first among equals."""
    order = torch.argsort(values, descending=True, stable=True)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen
