"""LocoRE: the last few generated tokens attended to a little more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmfix.decoders.groups import per_group
from vlmfix.errors import UsageError
from vlmfix.method import AttentionMethod, LayerContext, LayerSpec, Method, ModelFacts, check_range, resolve_layers
from vlmfix.plan import Plan, Rolling

REST, RECENT = range(2)


@dataclass(frozen=True)
class LocoRE(AttentionMethod):
    """Local Coherence Reinforcement.

    "Hallucination Begins Where Saliency Drops", arXiv 2601.20279, eq. 8 to 10 and algorithm 2: attention of each
    generated token to the generated tokens shortly before it is multiplied by 1 + beta. No code was released. The
    paper does not say whether rows are normalised again (here: yes, which is log(1 + beta) added to the scores), and
    neither the window nor the layers are in its text: both are parameters whose defaults are guesses of ours. Rows
    without a picture are changed too; the method never looks at pictures.

    Args:
        beta: gain; 0 is neutral. Published: 0.15 (LLaVA-1.5), 0.20 (Qwen2-VL).
        window: w_s, how many tokens back the gain reaches; the value is a guess.
        own_key: whether the window counts the token's own key as its first; as printed it starts at the token before.
        normalise: whether rows sum to one again.
        layers: fractions of depth, or exact indices; the choice of all layers is a guess.
    """

    needs_picture: ClassVar[bool] = False
    by_distance: ClassVar[bool] = True
    prefix_plain: ClassVar[bool] = True

    beta: float = 0.15
    window: int = 8
    own_key: bool = False
    normalise: bool = True
    layers: LayerSpec = (0.0, 1.0)

    def neutral(self) -> bool:
        """No gain."""
        return self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "beta", 0, 100)
        if not isinstance(self.window, int) or self.window < 1:
            raise UsageError(f"locore(window={self.window!r}): give the number of tokens, at least 1")
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers."""
        return resolve_layers(self.layers, depth)

    def plan(self, context: LayerContext) -> Plan | None:
        """A group that rolls along behind the current token, over generated positions only."""
        layout = context.layout
        start = torch.full_like(layout.last, layout.length)
        nearest = 0 if self.own_key else 1
        gain = per_group((1, 1 + self.beta), layout.kinds)
        return Plan(
            torch.zeros_like(layout.kinds),
            2,
            active_from=start + nearest,
            bias=gain.log() if self.normalise else None,
            rule=None if self.normalise else Gain(1 + self.beta),
            rolling=Rolling(RECENT, nearest, nearest + self.window - 1, start),
        )


@dataclass(frozen=True)
class Gain:
    """Factor on the recent group, without normalisation.

    Args:
        gain: 1 + beta.
    """

    gain: float

    def __call__(self, masses: torch.Tensor) -> torch.Tensor:
        """[B, H, Q, 2] masses -> factors."""
        factors = torch.ones_like(masses)
        factors[..., RECENT] = self.gain
        return factors
