"""VAR: attention of sink tokens redistributed to the other visual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.kernels.rules import FusedRule
from vlmfix.method import AttentionMethod, LayerContext, LayerSpec, Method, ModelFacts, check_range, resolve_layers
from vlmfix.plan import Plan

REST, VISUAL, VISUAL_SINK, TEXT_SINK = range(4)
REFERENCE_WIDTH = 4096
REFERENCE_TAU = 20.0


@dataclass(frozen=True)
class VAR(AttentionMethod):
    """Visual Attention Redistribution.

    "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321. A token is a sink of
    a layer when one of a few hidden dimensions dominates the residual stream entering it; image-centric heads give a
    part of what they pay to sinks to the other visual tokens, in proportion to what those already get.

    Args:
        move_fraction: p of the paper, fraction taken from sinks; 0 is neutral.
        keep_ratio: rho, smallest share of a row's visual mass outside sinks for the row to count as image-centric.
        min_mass: smallest visual mass of an image-centric row.
        tau: a token is a sink where |x_d| / rms(x) exceeds it; by default 20 at width 4096 and the same share of the
            squared norm at other widths (our scaling).
        sink_dims: D_sink, hidden dimensions of massive activations; found by measurement where absent.
        layers: fractions of depth, or exact indices.
        variant: "paper" leaves the last layer alone; "reference" includes it, as the released code does in spite of
            its setting.
    """

    reads_hidden: ClassVar[bool] = True

    move_fraction: float = 0.6
    keep_ratio: float = 0.5
    min_mass: float = 0.2
    tau: float | None = None
    sink_dims: tuple[int, ...] | None = None
    layers: LayerSpec = (0.0625, 1.0)
    variant: Literal["paper", "reference"] = "paper"

    def neutral(self) -> bool:
        """Nothing is moved."""
        return self.move_fraction == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Fills in tau and the sink dimensions.

        Raises:
            UsageError: a value out of range.
            Refusal: no sink dimension was given or found.
        """
        super().resolve(facts)
        for name in ("move_fraction", "keep_ratio", "min_mass"):
            check_range(self, name, 0, 1)
        if self.tau is not None:
            check_range(self, "tau", 0, 1e6)
        tau = REFERENCE_TAU * math.sqrt(facts.hidden_size / REFERENCE_WIDTH) if self.tau is None else self.tau
        dims = facts.sink_dims() if self.sink_dims is None else tuple(self.sink_dims)
        if not dims:
            raise Refusal(
                f"var: no massive-activation dimension was found in this {facts.family} model, so there are no "
                "sinks to move attention "
                f"from; give sink_dims=(...) if you know them"
            )
        bad = [d for d in dims if not 0 <= d < facts.hidden_size]
        if bad:
            raise UsageError(f"var(sink_dims={dims}): {bad} outside the hidden width {facts.hidden_size}")
        return replace(self, tau=tau, sink_dims=dims)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The chosen layers, without the last in the paper's variant."""
        layers = resolve_layers(self.layers, depth)
        return tuple(x for x in layers if x != depth - 1 or self.variant == "reference")

    def plan(self, context: LayerContext) -> Plan | None:
        """Groups the keys by sink or not; rows after the pictures are redistributed."""
        layout = context.layout
        sinks = self._sinks(context)
        if sinks is None:
            return None
        visual = layout.visual
        n_sinks = (visual & sinks).sum(1)
        if not bool(n_sinks.any()):
            return None
        groups = torch.where(visual, VISUAL, REST)
        groups = torch.where(sinks, torch.where(visual, VISUAL_SINK, TEXT_SINK), groups).to(torch.uint8)
        rule = redistribute(layout.n_visual, n_sinks, self.move_fraction, self.keep_ratio, self.min_mass)
        return Plan(groups, 4, active_from=layout.after_visual, rule=rule)

    def _sinks(self, context: LayerContext) -> Tensor | None:
        """[B, K] sinks among the prompt's tokens seen so far, which may come in chunks.

        None in layers through which a model runs only the last token of the prompt.
        """
        layout, hidden = context.layout, context.hidden
        sinks = context.memory.setdefault("sinks", torch.zeros_like(layout.visual))
        unread = context.memory.setdefault("unread", layout.visual.clone())
        seen = layout.length
        if hidden is not None and context.past < layout.length:
            assert self.sink_dims is not None
            assert self.tau is not None
            part = slice(context.past, min(context.past + hidden.shape[1], layout.length))
            phi = sink_score(hidden[:, : part.stop - part.start], self.sink_dims)
            sinks[:, part] = (phi > self.tau) & layout.valid[:, part]
            unread[:, part] = False
            seen = part.stop
        return None if bool(unread[:, :seen].any()) else sinks


def redistribute(n_visual: Tensor, n_sinks: Tensor, move: float, keep: float, min_mass: float) -> FusedRule:
    """The paper's factors of the groups (rest, visual, visual sink, text sink), as a rule the kernels can inline.

    Args:
        n_visual: [B] number of visual tokens.
        n_sinks: [B] number of visual sinks.
        move: fraction taken from sinks.
        keep: smallest non-sink share of the visual mass.
        min_mass: smallest visual mass.
    """
    numbers = [torch.full_like(n_visual, x, dtype=torch.float32) for x in (1 - keep, min_mass, 1 - move)]
    return FusedRule("redistribute", torch.stack([*numbers, n_visual.float(), n_sinks.float()], -1))


def sink_score(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Phi = max over d of |x_d| / rms(x): [B, Q, width] -> [B, Q] float32."""
    x = hidden.float()
    rms = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(dims)].abs().amax(-1) / rms
