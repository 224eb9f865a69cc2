"""LCD: a text-only language model contrasted, the more the surer it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmfix.decoders.contrast import keep, plausible
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import WithoutPictures

LEAST_ENTROPY = 1e-2


@dataclass(frozen=True)
class LCD(DecodingMethod):
    """Language-Contrastive Decoding with the model's own language model.

    "Mitigating Hallucinations in Large Vision-Language Models (LVLMs) via Language-Contrastive Decoding (LCD)", arXiv
    2408.04664: log_softmax((1 + a) l - a l') on the plausible set, a = alpha / H(l'), l' from the text alone.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        entropy: divide the weight by the text branch's entropy in nats (at least 0.01).
    """

    alpha: float = 2.0
    beta: float = 0.1
    entropy: bool = True

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        return self

    def branches(self) -> tuple[View, ...]:
        """The same text without pictures."""
        return (WithoutPictures(),) if self.alpha else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probabilities, contrasted per row and renormalised."""
        own = logits.log_softmax(-1)
        allowed = plausible(logits, self.beta)
        if step.branches:
            own = language_contrast(own, step.branches[0].log_softmax(-1), self.alpha, self.entropy)
        return keep(own, allowed).log_softmax(-1)


def language_contrast(own: Tensor, text: Tensor, alpha: float, entropy: bool) -> Tensor:
    """(1 + a) l - a l' with a = alpha / H(l') per row.

    Args:
        own: [B, V] log-probabilities of the model.
        text: [B, V'] log-probabilities of the text-only model; tokens it does not have (V' < V) are not contrasted.
        alpha: weight.
        entropy: divide by the entropy.
    """
    missing = own.shape[-1] - text.shape[-1]
    weight = own.new_full((own.shape[0], 1), alpha)
    if entropy:
        spread = -(text.exp() * text.clamp(min=-1e4)).sum(-1, keepdim=True)
        weight = alpha / spread.clamp(min=LEAST_ENTROPY)
    other = text if missing <= 0 else own.clone().index_copy_(1, _columns(text), text)
    other = other[:, : own.shape[-1]]
    floor = -1e4
    return ((1 + weight) * own.clamp(min=floor) - weight * other.clamp(min=floor)).where(own > floor, own)


def _columns(text: Tensor) -> Tensor:
    return text.new_ones(text.shape[-1]).cumsum(0).long() - 1
