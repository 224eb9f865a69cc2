"""SGRS: candidates whose saliency on the answer so far is too low are rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.method import DecodingMethod, LayerSpec, Method, ModelFacts, Step, check_range, resolve_layers


@dataclass(frozen=True)
class SGRS(DecodingMethod):
    """Saliency-Guided Rejection Sampling.

    "Hallucination Begins Where Saliency Drops", arXiv 2601.20279: of the K likeliest tokens, up to R are drawn one
    after the other; the first whose saliency reaches alpha times the mean of the last W committed saliencies is taken,
    and if none does, the most salient of all K. The saliency row is the one of the query that predicts the candidate
    (the released code reads the next one, which is zero), over generated positions.

    Args:
        alpha: share of the recent mean that a candidate must reach; 0 accepts every draw.
        top_k: K.
        draws: R.
        window: W; 0 for all committed tokens.
        layers: target layers, fractions of depth or exact indices (6, 7, 8 of 32 in the released code).
        draw: "order" tries candidates by probability, "sample" draws them.
        seed: of the draws.
    """

    needs_picture: ClassVar[bool] = False
    beams: ClassVar[bool] = False

    alpha: float = 0.6
    top_k: int = 5
    draws: int = 3
    window: int = 5
    layers: LayerSpec = (0.1875, 0.28125)
    draw: Literal["order", "sample"] = "order"
    seed: int = 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "alpha", 0, 10)
        check_range(self, "top_k", 1, 1000)
        check_range(self, "draws", 1, self.top_k)
        check_range(self, "window", 0, 10_000)
        if self.draw not in ("order", "sample"):
            raise UsageError(f"sgrs(draw={self.draw!r}): give 'order' or 'sample'")
        bad = [x for x in self.saliency_layers(facts.depth) if x not in facts.heads]
        if bad:
            raise Refusal(f"sgrs(layers={self.layers}): layers {bad} of this {facts.family} model have no attention")
        if any(x not in facts.heads for x in range(self.saliency_layers(facts.depth)[0], facts.depth)):
            raise Refusal(
                f"sgrs takes gradients from the logits to its layers; in {facts.family} layers between keep a running "
                "state that each step overwrites"
            )
        return self

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        """The target layers."""
        return resolve_layers(self.layers, depth)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The committed token's logit, -inf elsewhere; the first token has no answer to be salient on and is drawn."""
        probs, tokens = logits.softmax(-1).topk(self.top_k)
        if self.draw == "sample":
            uniforms = step.uniforms(self.seed, self.draws, len(logits)).to(logits.device)
            tokens = tokens.gather(1, drawn(probs, uniforms))
        if step.saliency is None:
            chosen = tokens[:, :1]
            step.notes["history"] = logits.new_full((len(logits), max(self.window, 1)), float("nan"))
        else:
            saliency, history = step.saliency(tokens), step.notes["history"]
            choice = choose(saliency, threshold(history, self.alpha, self.window), self.draws)[:, None]
            chosen, committed = tokens.gather(1, choice), saliency.gather(1, choice)
            if self.window > 0:
                step.notes["history"] = torch.cat([history[:, 1:], committed], 1)
            else:  # the mean of all
                mean = history.nan_to_num()
                step.notes["history"] = mean + (committed - mean) / (step.number - 1)
        return torch.full_like(logits, float("-inf")).scatter(1, chosen, logits.gather(1, chosen))


def threshold(history: Tensor, alpha: float, window: int) -> Tensor:
    """Tau [B]: alpha times the mean of the last `window` committed saliencies, 0 without any.

    Args:
        history: [B, committed], nan where nothing has been committed yet.
        alpha: share.
        window: number of entries; all for 0.
    """
    recent = history[:, -window:] if window > 0 else history
    return alpha * recent.nanmean(1).nan_to_num()


def choose(saliency: Tensor, tau: Tensor, draws: int) -> Tensor:
    """Index [B] of the committed candidate: the first of R that passes, else the most salient (paper, section 3.3).

    Args:
        saliency: [B, K] of the candidates, those that are drawn first.
        tau: [B].
        draws: R.
    """
    passing = saliency[:, :draws] >= tau[:, None]
    return torch.where(passing.any(1), passing.int().argmax(1), saliency.argmax(1))


def drawn(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Indices [B, K] of the candidates: R drawn without replacement, by inverse CDF, then the others in their order.

    Args:
        probs: [B, K], descending.
        uniforms: [B, R].
    """
    count, draws = probs.shape[1], uniforms.shape[1]
    turn = draws + torch.arange(count, device=probs.device).repeat(len(probs), 1)
    for r in range(draws):
        taken = turn < draws
        left = probs.masked_fill(taken, 0.0)
        cdf = (left / left.sum(1, keepdim=True)).cumsum(1)
        index = (cdf < uniforms[:, r, None]).sum(1, keepdim=True).clamp(max=count - 1)
        likeliest = probs.masked_fill(taken, -1.0).argmax(1, keepdim=True)
        turn = turn.scatter(1, torch.where(taken.gather(1, index), likeliest, index), r)
    return turn.argsort(1)
