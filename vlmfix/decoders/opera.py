"""OPERA: beam search against tokens that everything after them leans on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.method import (
    AttentionMethod,
    DecodingMethod,
    Glance,
    LayerContext,
    Method,
    ModelFacts,
    Search,
    Step,
    check_range,
)
from vlmfix.plan import Plan

EARLY = 10
"""Answers up to this length get the bonus for looking at the picture, longer ones the penalty; no return before it."""

UNIT = math.log(1e-7)
LARGEST = math.log(torch.finfo(torch.float16).max)
FILLER = -999.0
"""What the released code puts in place of the logits of tokens that are no candidates."""


@dataclass(frozen=True)
class LastLayerRows(AttentionMethod):
    """Notes the last layer's attention of the queries of every decoding step, the largest of all heads."""

    needs_picture: ClassVar[bool] = False

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """Nowhere: it only looks."""
        return ()

    def watches(self, depth: int) -> tuple[int, ...]:
        """The last layer."""
        return (depth - 1,)

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """[B, Q, K] weights, once the prompt is read."""
        if glance.context.past >= glance.context.layout.length:
            queries = torch.arange(glance.query.shape[2], device=glance.query.device)
            notes["rows"] = glance.rows(queries).amax(1)
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """None."""
        return None


@dataclass(frozen=True)
class OPERA(DecodingMethod):
    """Over-trust Penalty and Retrospection-Allocation.

    "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation", arXiv 2311.17911, as its released code does it. With w_ij the last layer's attention of
    answer token i to answer token j, the largest of all heads and every row normalised over all keys, a candidate's
    logit falls by alpha * max_j 1e-7 prod_{i >= j} scale w_ij, the window being the whole answer; in the first ten
    tokens it rises instead by alpha times the candidate's attention to the pictures. Where all beams have leaned on one
    place for more than `threshold` steps, decoding goes back to just behind it and takes other tokens.

    Log-probabilities are normalised over a beam's candidates, so their sums compare with each other only; then come
    logits processors, beam scores and stopping criteria, for each sample by itself. Where candidates run out, other
    tokens follow far behind them, in the model's order. After a return the whole vocabulary is allowed for one token,
    without penalty; continuations taken there before count as the least likely. Sampling, streaming and caches that
    cannot be cut are refused; with alpha 0 and no threshold it is beam search over each beam's N best tokens.

    Args:
        alpha: weight of penalty and bonus.
        candidates: N, likeliest tokens tried after every beam; 1 searches greedily with returns.
        scale: sigma, factor on attention weights.
        threshold: r, steps a place must be exceeded by; None never goes back.
        rollbacks: returns to one place; the number of candidates by default, as in the code (5 in the paper).
        num_beams: beams where `generate` is not told a number above 1.
        reference_rounding: as the released code: column scores rounded to float16 (zero below 3e-8, infinite above
            65504), places stay with a beam's rank when beams are reordered, and all tokens that are no candidates count
            the same.
    """

    needs_picture: ClassVar[bool] = False
    same_uncached: ClassVar[bool] = False

    alpha: float = 1.0
    candidates: int = 5
    scale: float = 50.0
    threshold: int | None = 15
    rollbacks: int | None = None
    num_beams: int = 5
    reference_rounding: bool = False

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values, and that the last layer has attention."""
        check_range(self, "alpha", 0, 1000)
        check_range(self, "scale", 0, 1e6, open_low=True)
        for name, low in (("candidates", 1), ("num_beams", 1), ("threshold", 0), ("rollbacks", 0)):
            value = getattr(self, name)
            if value is not None or name in ("candidates", "num_beams"):
                check_range(self, name, low, 10_000)
                if not isinstance(value, int):
                    raise UsageError(f"opera({name}={value!r}): give a whole number")
        if not isinstance(self.reference_rounding, bool):
            raise UsageError(f"opera(reference_rounding={self.reference_rounding!r}): give True or False")
        if facts.depth - 1 not in facts.heads:
            raise Refusal(f"opera reads the last layer's attention, and that layer of {facts.family} has none")
        return self

    def attention(self) -> tuple[AttentionMethod, ...]:
        """The look at the last layer."""
        return (LastLayerRows(on="visible"),)

    def search(self) -> Search | None:
        """Itself."""
        return self

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The logits: decisions are made over whole beams."""
        return logits

    @property
    def returns(self) -> int:
        """Returns to one length."""
        return self.candidates if self.rollbacks is None else self.rollbacks

    @property
    def history_follows_beams(self) -> bool:
        """Yes, unless as the code does it."""
        return not self.reference_rounding

    def extend(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Log of the column products after one more row."""
        rows = (self.scale * weights.float()).log()
        return torch.cat([sums + rows[..., :-1], rows[..., -1:]], -1)

    def judge(self, sums: Tensor, visual: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Penalty or bonus, and the column that is the strongest for most candidates of a beam."""
        columns = column_scores(sums, self.reference_rounding)
        strongest, length = columns.amax(-1), columns.shape[-1]
        index = torch.arange(length, device=columns.device)
        place = torch.where(columns == strongest[..., None], index, length).amin(-1)  # the first of equals
        penalty = -visual if length <= EARLY else strongest.float()
        return self.alpha * penalty if self.alpha else torch.zeros_like(visual), tuple(map(mode, place.tolist()))

    def fill(self, logits: Tensor) -> Tensor:
        """Far behind every candidate."""
        if self.reference_rounding:
            return torch.full_like(logits, FILLER)
        return FILLER + logits - logits.amax(-1, keepdim=True)

    def back(self, history: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Just behind the place that every beam has leaned on for too long, or at it."""
        place = mode(history[-1])
        counts = [sum(step[beam] == place for step in history) for beam in range(len(history[-1]))]
        if self.threshold is None or place < EARLY or min(counts) <= self.threshold:
            return ()
        return place + 1, place


def column_scores(sums: Tensor, rounded: bool) -> Tensor:
    """Column scores, from logs of products.

    Args:
        sums: [..., m].
        rounded: to float16, infinite where too large.

    Returns:
        [..., m] float32 no larger than float16 can be, or float16.
    """
    logs = sums + UNIT
    return logs.exp().half() if rounded else logs.clamp(max=LARGEST).exp()


def mode(places: Sequence[int]) -> int:
    """The most frequent place, the smallest of equals."""
    counts = Counter(places)
    most = max(counts.values())
    return min(place for place, count in counts.items() if count == most)
