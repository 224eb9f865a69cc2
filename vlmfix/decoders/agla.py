"""AGLA: the logits of a branch that sees only what matches the question added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.avisc import LastRowAttention
from vlmfix.decoders.contrast import assemble, keep, plausible
from vlmfix.errors import Refusal
from vlmfix.hf import matching
from vlmfix.hf.families import FAMILIES
from vlmfix.layout import Layout
from vlmfix.method import AttentionMethod, DecodingMethod, Method, ModelFacts, Rendering, Step, check_range
from vlmfix.view import Picture, View
from vlmfix.views.masked import Masked

OWN = "own"
OWN_SHARE = 0.75
"""Share of pixels kept under the model's own attention, which has no similarity to derive it from; our choice."""


@dataclass(frozen=True)
class AGLA(DecodingMethod):
    """Assembly of Global and Local Attention.

    "Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention",
    arXiv 2406.12718: s = z + alpha z' on the plausible set of z, z' from a branch whose pictures are black where they
    do not match the question. Relevance comes from GradCAM of a BLIP image-text-matching model as in the paper, or
    from the model's own attention to the picture in the prefill (last prompt row, mean over layers and heads; ours).
    Each branch has its own cache; the released loop copies the visible branch's at every step, so that from the second
    token on it only sharpens. The mask is laid over the picture as the model sees it, not over a squeezed square.

    Args:
        alpha: weight of the local branch; 0 drops it and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        source: "own", or the Hub id or folder of a BLIP image-text-matching checkpoint.
        share: share of pixels kept; by default 1 - similarity / 2 with BLIP as in the paper, 0.75 with own attention.
        normalise: divides the scores by 1 + alpha, so that agreeing branches do not sharpen.
        colours: mean and deviation of the picture normalisation, per channel; filled in from the processor.
    """

    alpha: float = 2.0
    beta: float = 0.5
    source: str = OWN
    share: float | None = None
    normalise: bool = False
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    _rendering: ClassVar[Rendering | None] = None

    def neutral(self) -> bool:
        """Neither a branch nor a mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges and asks the processor what black is.

        Raises:
            Refusal: there is no processor, and colours are missing or BLIP needs the question.
            UsageError: the BLIP checkpoint cannot be loaded.
        """
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        if self.share is not None:
            check_range(self, "share", 0, 1)
        if self.alpha == 0:
            return self
        if facts.rendering is None and (self.colours is None or self.source != OWN):
            raise Refusal("agla needs the processor for colours and question; give it (or colours, with source=own)")
        family = FAMILIES.get(facts.family)
        if self.source == OWN and family is not None and not family.spatial:
            raise Refusal(
                f"agla: visual tokens of {facts.family} stand for no place in the picture ({family.tokens}), so its "
                "own attention says nothing about pixels; give source= a BLIP checkpoint"
            )
        if self.source != OWN:
            matching.load(self.source)
        if facts.rendering is None:
            return self
        ready = replace(self, colours=self.colours or facts.rendering.colours())
        object.__setattr__(ready, "_rendering", facts.rendering)
        return ready

    def late(self) -> bool:
        """With own attention, the branch waits for the prefill."""
        return self.alpha != 0 and self.source == OWN

    def branches(self) -> tuple[View, ...]:
        """With BLIP, the same prompt with masked pictures."""
        if not self.alpha or self.source == OWN:
            return ()
        return (self._masked(self._matching),)

    def attention(self) -> tuple[AttentionMethod, ...]:
        """With own attention, the look at the last prompt row."""
        return (LastRowAttention(on="visible"),) if self.late() else ()

    def redrawn(self, notes: dict[str, Tensor], layout: Layout, visible: int) -> View:
        """The same prompt with pictures masked by the prefill's attention."""
        rows = torch.stack(list(notes.values())).mean(0)

        def attended(picture: Tensor, place: Picture) -> tuple[Tensor, float]:
            weights = rows[place.row][layout.images[place.row] == place.index]
            return weights.view(grid(len(weights), picture)), OWN_SHARE if self.share is None else self.share

        return self._masked(attended)

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The sum of both views on the plausible set."""
        scores = assemble(logits, step.branches[0], self.alpha) if step.branches else logits
        scores = scores / (1 + self.alpha) if self.normalise and step.branches else scores
        return keep(scores, plausible(logits, self.beta))

    def _masked(self, relevance: Any) -> Masked:
        assert self.colours is not None
        return Masked(*self.colours, relevance)

    def _matching(self, picture: Tensor, place: Picture) -> tuple[Tensor, float]:
        assert self._rendering is not None
        found, similarity = matching.load(self.source).relevance(picture, self._rendering.question(place.behind))
        return found, kept_share(similarity) if self.share is None else self.share


def kept_share(similarity: float) -> float:
    """Share of pixels kept: the better picture and question match, the less."""
    return min(1 - similarity / 2, 1 - 1e-5)


def grid(tokens: int, picture: Tensor) -> tuple[int, int]:
    """Rows and columns of a picture's visual tokens, in the picture's proportions.

    Raises:
        Refusal: no such grid has that many tokens.
    """
    height, width = picture.shape[-2:]
    rows = round((tokens * height / width) ** 0.5)
    if rows == 0 or tokens % rows or abs(rows * rows * width / height - tokens) > max(rows, 1):
        raise Refusal(
            f"agla: {tokens} visual tokens of a {height} x {width} picture form no grid, so attention cannot be laid "
            "over it; give source= a BLIP checkpoint"
        )
    return rows, tokens // rows
