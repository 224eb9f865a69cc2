"""LCD: a text-only language model contrasted, the more the surer it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfix.decoders.contrast import keep, plausible
from vlmfix.errors import Refusal, UsageError
from vlmfix.hf import reader
from vlmfix.hf.reader import TextModel
from vlmfix.method import DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import WithoutPictures

LEAST_ENTROPY = 1e-2
LEAST_LOG = -1e4


@dataclass(frozen=True)
class LCD(DecodingMethod):
    """Language-Contrastive Decoding, with the model's own language model or another.

    "Mitigating Hallucinations in Large Vision-Language Models (LVLMs) via Language-Contrastive Decoding (LCD)", arXiv
    2408.04664: log_softmax((1 + a) l - a l') on the plausible set, a = alpha / H(l'), l' from the text alone.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        entropy: divide the weight by the text branch's entropy in nats (at least 0.01).
        variant: "reference" leaves the entropy without a floor and gives tokens that the text model lacks the
            probability 1, as the released code does.
        lm: Hub id or folder of a text-only language model with the same tokenizer, which reads the text in a cache of
            its own; the model itself, without pictures, by default.
    """

    alpha: float = 2.0
    beta: float = 0.1
    entropy: bool = True
    variant: Literal["paper", "reference"] = "paper"
    lm: str | None = None

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges, and the vocabulary of a language model of its own.

        Raises:
            Refusal: the vocabularies differ, or there is no processor to compare them by.
            UsageError: the language model cannot be loaded.
        """
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if self.variant not in ("paper", "reference"):
            raise UsageError(f"lcd(variant={self.variant!r}): give 'paper' or 'reference'")
        if self.lm is not None and self.alpha:
            if facts.rendering is None:
                raise Refusal(f"lcd(lm={self.lm}) needs the processor to compare vocabularies; give the processor")
            reader.load(self.lm).check(facts.rendering.vocabulary())
        return self

    def branches(self) -> tuple[View, ...]:
        """The same text without pictures, unless another model reads it."""
        return (WithoutPictures(),) if self.alpha and self.lm is None else ()

    def reads(self) -> tuple[TextModel, View] | None:
        """The language model of its own, which reads the text without pictures."""
        return (reader.load(self.lm), WithoutPictures()) if self.alpha and self.lm is not None else None

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Log-probabilities, contrasted per row and renormalised."""
        own = logits.log_softmax(-1)
        allowed = plausible(logits, self.beta)
        if step.branches:
            text, faithful = step.branches[0].log_softmax(-1), self.variant == "reference"
            weight = text_weight(text, self.alpha, 0.0 if faithful else LEAST_ENTROPY) if self.entropy else self.alpha
            own = language_contrast(own, text, weight, penalise_missing=faithful)
        return keep(own, allowed).log_softmax(-1)


def text_weight(text: Tensor, alpha: float, floor: float) -> Tensor:
    """Alpha / H of log-probabilities [B, V'] -> [B, 1]; the entropy is in nats, at least the floor."""
    spread = -(text.exp() * text.clamp(min=LEAST_LOG)).sum(-1, keepdim=True)
    return alpha / spread.clamp(min=floor)


def language_contrast(own: Tensor, text: Tensor, weight: Tensor | float, penalise_missing: bool = False) -> Tensor:
    """(1 + a) l - a l' per row.

    Args:
        own: [B, V] log-probabilities of the model.
        text: [B, V'] log-probabilities of the text-only model.
        weight: a, or [B, 1].
        penalise_missing: tokens the text model does not have (V' < V) count as certain to it; otherwise they are not
            contrasted.
    """
    size = min(own.shape[-1], text.shape[-1])
    rest = own[:, size:]
    other = torch.cat([text[:, :size], torch.zeros_like(rest) if penalise_missing else rest], -1)
    scores = (1 + weight) * own.clamp(min=LEAST_LOG) - weight * other.clamp(min=LEAST_LOG)
    return scores.where(own > LEAST_LOG, own)
