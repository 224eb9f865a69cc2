"""AvisC: a branch that sees the picture only through its blind tokens subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import UsageError
from vlmfix.layout import Layout
from vlmfix.method import AttentionMethod, DecodingMethod, Glance, LayerContext, Method, ModelFacts, Step, check_range
from vlmfix.plan import Plan


@dataclass(frozen=True)
class LastRowAttention(AttentionMethod):
    """Notes, at the prefill, how much the last prompt token attends each prompt token, per layer, mean over heads."""

    watches_steps: ClassVar[bool] = False

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """Nowhere: it only looks."""
        return ()

    def watches(self, depth: int) -> tuple[int, ...]:
        """Every layer with attention."""
        return tuple(range(depth))

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """[B, K] weights of one layer."""
        layout, name = glance.context.layout, f"layer {glance.context.layer}"
        if name not in notes and glance.context.past + glance.query.shape[2] >= layout.length:
            last = torch.tensor([glance.query.shape[2] - 1], device=glance.query.device)
            weights = glance.rows(last)[:, :, 0].mean(1)
            table = weights.new_zeros(layout.rows, layout.length)
            inside = glance.k_pos < layout.length
            notes[name] = table.index_copy(1, glance.k_pos[inside], weights[:, inside])
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """None."""
        return None


@dataclass(frozen=True)
class AvisC(DecodingMethod):
    """Attentional Vision Calibration.

    "Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models", arXiv
    2405.17820: s = (1 + alpha) z - alpha z' on the plausible set, z' from a branch in which the embeddings of all
    visual tokens but the blind ones are zeros. Blind are the tokens that the last prompt token attends at least mean +
    lambda std, on average over the layers that hold most of the attention to the picture.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        layer_gamma: the most visual layers are kept until they hold this share of all attention to the picture.
        lamb: lambda, standard deviations above the mean.
        fill: what wiped embeddings become, "zeros" or "ones".
    """

    alpha: float = 1.0
    beta: float = 0.1
    layer_gamma: float = 0.5
    lamb: float = 1.0
    fill: Literal["zeros", "ones"] = "zeros"

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        check_range(self, "layer_gamma", 0, 1)
        check_range(self, "lamb", -100, 100)
        if self.fill not in ("zeros", "ones"):
            raise UsageError(f"avisc(fill={self.fill!r}): give 'zeros' or 'ones'")
        return self

    def late(self) -> bool:
        """The branch waits for the prefill's attention."""
        return self.alpha != 0

    def attention(self) -> tuple[AttentionMethod, ...]:
        """The look at the last prompt row."""
        return (LastRowAttention(on="visible"),) if self.alpha else ()

    def wiped(self, notes: dict[str, Tensor], layout: Layout, visible: int) -> Tensor:
        """All visual tokens but the blind ones."""
        rows = torch.stack(list(notes.values()))[:, :visible]
        visual = layout.visual[:visible]
        return visual & ~blind_tokens(rows, visual, self.layer_gamma, self.lamb)

    def blank(self) -> float:
        """Zeros or ones."""
        return float(self.fill == "ones")

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The masked contrast; a row whose branch is not a number stays its own."""
        if not step.branches:
            return keep(logits, plausible(logits, self.beta))
        branch = torch.where(step.branches[0].isnan(), logits, step.branches[0])
        return keep(contrast(logits, branch, self.alpha), plausible(logits, self.beta))


def blind_tokens(rows: Tensor, visual: Tensor, layer_gamma: float, lamb: float) -> Tensor:
    """Section 3 of the paper.

    Args:
        rows: [L, B, K] attention of the last prompt token per layer, mean over heads.
        visual: [B, K] bool.
        layer_gamma: share of attention the kept layers hold.
        lamb: standard deviations above the mean.

    Returns:
        [B, K] bool.
    """
    weights = rows.float() * visual
    share = weights.sum(-1)
    share = share / share.sum(0, keepdim=True).clamp(min=1e-30)
    ranked, order = share.sort(0, descending=True)
    count = 1 + (ranked.cumsum(0) < layer_gamma).sum(0)
    chosen = torch.arange(len(rows), device=rows.device)[:, None] < count
    chosen = torch.zeros_like(chosen).scatter(0, order, chosen)
    mean = (weights * chosen[..., None]).sum(0) / chosen.sum(0)[:, None]
    n = visual.sum(1, keepdim=True).clamp(min=1)
    centre = mean.sum(1, keepdim=True) / n
    spread = (((mean - centre) * visual).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return visual & (mean >= centre + lamb * spread)
