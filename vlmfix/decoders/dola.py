"""DoLa: an earlier layer's log-probabilities subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.decoders.contrast import keep, plausible
from vlmfix.errors import UsageError
from vlmfix.method import DecodingMethod, LayerSpec, Method, ModelFacts, Step, check_range, resolve_layers

BUCKETS = {"low": (0.0, 0.5), "high": (0.5, 1.0)}


@dataclass(frozen=True)
class DoLa(DecodingMethod):
    """Decoding by Contrasting Layers, arXiv 2309.03883: s = l_L - l_j on the plausible set of l_L.

    The premature layer j is the candidate farthest from the last layer, chosen anew at every step and for every row.
    The released code measures KL(M || p) where the paper writes the Jensen-Shannon divergence; both are offered.

    Args:
        layers: candidates, indices into the residual stream (0 is the embedding); a single one makes the choice static.
            By default the even layers of `bucket`.
        bucket: "low" for the lower half of the model, "high" for the upper.
        beta: plausible set p >= beta * max p.
        norm: apply the model's final norm to early layers (the released code does not).
        divergence: "reference" or "js".
        shared: one choice for the whole batch, as in the released code.
    """

    needs_picture: ClassVar[bool] = False

    layers: LayerSpec | None = None
    bucket: Literal["low", "high"] = "low"
    beta: float = 0.1
    norm: bool = False
    divergence: Literal["reference", "js"] = "reference"
    shared: bool = False

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "beta", 0, 1)
        if self.bucket not in BUCKETS:
            raise UsageError(f"dola(bucket={self.bucket!r}): give 'low' or 'high'")
        if self.divergence not in ("reference", "js"):
            raise UsageError(f"dola(divergence={self.divergence!r}): give 'reference' or 'js'")
        self.taps(facts.depth)
        return self

    def taps(self, depth: int) -> tuple[int, ...]:
        """The candidates."""
        if self.layers is not None:
            return resolve_layers(self.layers, depth)
        return tuple(x for x in resolve_layers(BUCKETS[self.bucket], depth) if x % 2 == 0)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Difference to the premature layer of each row."""
        own = logits.log_softmax(-1)
        early = step.early(self.norm).log_softmax(-1)
        chosen = torch.zeros(own.shape[0], dtype=torch.long, device=own.device)
        if len(early) > 1:
            distance = layer_divergence(own, early, self.divergence)
            chosen = distance.mean(1).argmax().expand_as(chosen) if self.shared else distance.argmax(0)
        premature = early[chosen, torch.arange(own.shape[0], device=own.device)]
        return keep(own - premature, plausible(logits, self.beta))


def layer_divergence(own: Tensor, early: Tensor, kind: str) -> Tensor:
    """How far each candidate layer is from the last one.

    Args:
        own: [B, V] log-probabilities of the last layer.
        early: [C, B, V] log-probabilities of the candidates.
        kind: "reference" for the mean over the vocabulary of KL(M || p), "js" for Jensen-Shannon, M the mean
        distribution.

    Returns:
        [C, B].
    """
    p, q = own.exp(), early.exp()
    mean = (p + q) / 2
    if kind == "js":
        log = mean.clamp(min=1e-30).log()
        return ((p * (own - log)).sum(-1) + (q * (early - log)).sum(-1)) / 2
    log = mean.log()
    return ((mean * (log - own)).mean(-1) + (mean * (log - early)).mean(-1)) / 2
