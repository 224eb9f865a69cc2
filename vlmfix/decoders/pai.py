"""PAI: scores of visual keys raised by a share of their own magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmfix.decoders.groups import MAGNITUDE, per_group
from vlmfix.method import AttentionMethod, LayerContext, LayerSpec, Method, ModelFacts, check_range, resolve_layers
from vlmfix.plan import Plan

REST, VISUAL = range(2)


@dataclass(frozen=True)
class PAI(AttentionMethod):
    """Pay Attention to Image, the amplification in attention.

    "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs", arXiv 2407.21771:
    z_j <- z_j + alpha |z_j| for visual keys j of the token being generated, in all heads. The gain follows the size of
    the raw scores, so models that normalise queries and keys need another alpha. The paper's contrast with a text-only
    branch is the method `pai_guidance`.

    Args:
        alpha: share of its magnitude by which a score rises; 0 is neutral. Published: 0.5 (LLaVA-1.5), 0.6 (Shikra),
            0.2 (MiniGPT-4). Above 1 negative scores turn positive.
        prompt_row: whether the last prompt token is amplified too, as the paper says; the released code with contrast
            leaves it alone.
        layers: fractions of depth, or exact indices.
    """

    scales_scores: ClassVar[bool] = True
    prefix_plain: ClassVar[bool] = True

    alpha: float = 0.5
    prompt_row: bool = True
    layers: LayerSpec = (0.0625, 1.0)

    def neutral(self) -> bool:
        """Nothing is raised."""
        return self.alpha == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the range."""
        check_range(self, "alpha", 0, MAGNITUDE)
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers."""
        return resolve_layers(self.layers, depth)

    def plan(self, context: LayerContext) -> Plan | None:
        """Visual keys get the slope 1 + alpha above zero and 1 - alpha below it."""
        layout = context.layout
        return Plan(
            layout.visual.to(layout.kinds.dtype),
            2,
            active_from=layout.last + (0 if self.prompt_row else 1),
            slope_pos=per_group((1, 1 + self.alpha), layout.kinds),
            slope_neg=per_group((1, 1 - self.alpha), layout.kinds),
        )
