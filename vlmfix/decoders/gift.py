"""GIFT: attention to what the question made the model look at is raised, and to the question with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmfix.decoders.words import FILTERS, tokens_in
from vlmfix.errors import Refusal, UsageError, nearest
from vlmfix.kernels.rules import FusedRule
from vlmfix.layout import NEVER
from vlmfix.method import (
    AttentionMethod,
    Glance,
    LayerContext,
    LayerSpec,
    Method,
    ModelFacts,
    check_range,
    resolve_layers,
)
from vlmfix.plan import Plan

REST, VISUAL, QUESTION = range(3)
CHUNK = 64


@dataclass(frozen=True)
class GIFT(AttentionMethod):
    """Gaze Shift-Guided Cross-modal Fusion Enhancement.

    "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation", arXiv
    2510.22067. While the prompt is read, each content word of the question is asked by how much attention to each
    visual token rose from the token before; the mean over words and the more shifting half of the heads, clipped at
    three deviations and brought to [0, 1], is the map s. For tokens that predict, attention to visual token j is
    multiplied by exp(alpha s_j) in the more visual half of the heads, attention to the question by the gain r pooled
    over those heads in the half that looks at it most, and every head's row is normalised again. Rows are independent
    of each other. Where text stands before the picture it is no part of the question: it cannot have looked.

    Args:
        alpha: strength; 0 is neutral. Published: 5 (LLaVA-1.5), 4 (Qwen2-VL).
        saliency_layers: where the map is read: fractions of depth, or exact indices; published is layer 11 of 32.
        layers: where attention is raised; published are layers 12 to 22 of 32. If the map is read above the lowest of
            them, the last prompt token runs by itself.
        words: content words of the question: "stop-words" (all others), "spacy" (by part of speech), "all" tokens, or
            "auto": stop words with a processor, all tokens without. If none is found, all tokens count.
        max_weight: cap on exp(alpha s); none by default, and at alpha = 5 weights reach 148.
        max_gain: cap on r; none by default.
    """

    watches_steps: ClassVar[bool] = False

    alpha: float = 5.0
    saliency_layers: LayerSpec = (0.34375, 0.375)
    layers: LayerSpec = (0.375, 0.71875)
    words: Literal["auto", "stop-words", "spacy", "all"] = "auto"
    max_weight: float | None = None
    max_gain: float | None = None

    def neutral(self) -> bool:
        """No weight."""
        return self.alpha == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges.

        Raises:
            Refusal: content words are wanted and there is no processor, or the prompt cannot be read in two parts.
        """
        check_range(self, "alpha", 0, 50)
        for name in ("max_weight", "max_gain"):
            if getattr(self, name) is not None:
                check_range(self, name, 1, math.inf)
        if self.words not in (*FILTERS, "auto"):
            raise UsageError(
                f"gift(words={self.words!r}): no such filter{nearest(str(self.words), (*FILTERS, 'auto'))}"
            )
        if facts.rendering is None and self.words not in ("auto", "all"):
            raise Refusal(
                f"gift(words={self.words!r}) needs the processor to read the question; give it, or words='all'"
            )
        if not self._layers(facts):
            raise Refusal(
                f"gift: none of its saliency_layers {self.watches(facts.depth)} has attention in this "
                f"{facts.family} model"
            )
        if facts.prefix and self.splits_prefill(facts.depth):
            raise Refusal(
                f"gift reads its map above the layers it changes, so the last prompt token must run by itself; in "
                f"{facts.family} other tokens see it. Choose saliency_layers below layers"
            )
        return super().resolve(facts)

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """The layers where attention is raised."""
        return resolve_layers(self.layers, depth)

    def splits_prefill(self, depth: int) -> bool:
        """Where the map is read above the lowest changed layer."""
        return self.watches(depth)[-1] > self.acts_on(depth)[0]

    def watches(self, depth: int) -> tuple[int, ...]:
        """The layers where the map is read."""
        return resolve_layers(self.saliency_layers, depth)

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Collects the question's rows; the map is made when all of them are there.

        Raises:
            Refusal: a layer never sees the question's rows.
        """
        if "weight" in notes:
            return False
        context, layers = glance.context, self._layers(glance.context.facts)
        if "counts" not in notes:
            notes |= self._question(context)
        self._collect(glance, notes, f"layer {context.layer} ")
        end = context.past + glance.query.shape[2]
        if context.layer != layers[-1] or end <= int((notes["before"] + notes["lengths"]).max()):
            return False
        for layer in layers:
            if bool((notes.pop(f"layer {layer} read") < notes["lengths"]).any()):
                raise Refusal(
                    f"gift reads its map in layer {layer}, where this model runs only the last token of the prompt; "
                    "choose lower saliency_layers"
                )
            del notes[f"layer {layer} edge"]
        rises = [notes.pop(f"layer {layer} rise") for layer in layers]
        notes["weight"] = self._weights(context, rises, notes["counts"].sum(1))
        return True

    def _collect(self, glance: Glance, notes: dict[str, Tensor], name: str) -> None:
        """Adds up how attention rises over those of the question's rows that are among this forward's queries."""
        context, before, counts = glance.context, notes["before"], notes["counts"]
        queries, length = glance.query.shape[2], context.layout.length
        edge = notes.get(name + "edge")  # the last row of the forward before
        total = notes.get(name + "rise", before.new_zeros(len(before), context.heads, length, dtype=torch.float32))
        read = notes.get(name + "read", torch.zeros_like(before))
        for start in range(0, counts.shape[1], CHUNK):
            count = counts[:, start : start + CHUNK]
            at = before[:, None] + start + torch.arange(count.shape[1] + 1, device=before.device) - context.past
            here = (at >= 0) & (at < queries)
            if not bool(here.any()):
                continue
            rows = on_prompt(glance, glance.rows(at.clamp(0, queries - 1)))
            if edge is not None:
                rows = torch.where((at == -1)[:, None, :, None], edge, rows)
            both = here[:, 1:] & (here[:, :-1] | (at[:, :-1] == -1 if edge is not None else False))
            total = total + rise(rows, count * both)
            read = read + (
                both & (torch.arange(start, start + both.shape[1], device=at.device) < notes["lengths"][:, None])
            ).sum(1)
        notes[name + "rise"], notes[name + "read"] = total, read
        notes[name + "edge"] = on_prompt(glance, glance.rows(torch.tensor([queries - 1], device=before.device)))

    def _layers(self, facts: ModelFacts) -> tuple[int, ...]:
        """The layers where the map is read, as far as they have attention."""
        return tuple(layer for layer in self.watches(facts.depth) if layer in facts.heads)

    def plan(self, context: LayerContext) -> Plan | None:
        """Visual keys weighted by the map, the question's raised by the pooled gain."""
        layout, notes = context.layout, context.notes
        if "weight" not in notes:
            return None
        groups = torch.where(layout.visual, VISUAL, REST)
        groups = torch.where(notes["asked"], QUESTION, groups).to(torch.uint8)
        cap = math.inf if self.max_gain is None else self.max_gain
        arguments = torch.tensor([context.heads // 2, cap], device=groups.device).expand(layout.rows, 2)
        start = torch.where(notes["lengths"] > 0, layout.last, NEVER)
        return Plan(groups, 3, start, key_weight=notes["weight"], rule=FusedRule("gaze", arguments.contiguous()))

    def _question(self, context: LayerContext) -> dict[str, Tensor]:
        """Where the question stands.

        Returns:
            before [B] the slot before it, lengths [B], counts [B, n] how often each token counts, asked [B, K] bool.
        """
        layout, facts = context.layout, context.facts
        before, counts = [], []
        for row in range(layout.rows):
            start, end = int(layout.after_visual[row]), int(layout.last[row])
            content = [1] * max(end - start, 0)
            if start < end and facts.rendering is not None and context.ids is not None:
                ids = context.ids[row, start : end + 1].tolist()
                lead, tail = facts.rendering.within(ids)
                start, end = start + lead, min(start + tail, end)
                content = self._content(context, ids[lead : lead + max(end - start, 0)])
            before.append(start - 1 if content else 0)
            counts.append(content if any(content) else [1] * len(content))
        device, longest = layout.kinds.device, max(len(row) for row in counts)
        lengths = torch.tensor([len(row) for row in counts], device=device)
        first = torch.tensor(before, device=device)
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in counts], device=device)
        index = torch.arange(layout.length, device=device)
        asked = (index > first[:, None]) & (index <= (first + lengths)[:, None])
        return {"before": first, "lengths": lengths, "counts": padded.reshape(layout.rows, longest), "asked": asked}

    def _content(self, context: LayerContext, ids: list[int]) -> list[int]:
        """How often each token of the question counts."""
        rendering = context.facts.rendering
        assert rendering is not None
        pieces = rendering.pieces(ids)
        chosen = FILTERS["stop-words" if self.words == "auto" else self.words]
        return tokens_in(pieces, chosen("".join(pieces)))

    def _weights(self, context: LayerContext, rises: list[Tensor], counts: Tensor) -> Tensor:
        """[B, K] exp(alpha s) at visual tokens, 0 elsewhere."""
        layout = context.layout
        out = torch.zeros(layout.kinds.shape, device=counts.device)
        for row, visual in enumerate(layout.visual):
            if bool(visual.any()):
                shifts = torch.stack([gaze_shift(total[row][:, visual], counts[row]) for total in rises])
                out[row, visual] = (self.alpha * normalised(shifts.mean(0))).exp()
        return out if self.max_weight is None else out.clamp(max=self.max_weight)


def on_prompt(glance: Glance, rows: Tensor) -> Tensor:
    """Attention rows [B, H, n, K] on the slots of the prompt."""
    known = glance.k_pos < glance.context.layout.length
    out = rows.new_zeros(*rows.shape[:3], glance.context.layout.length)
    out[..., glance.k_pos[known]] = rows[..., known]
    return out


def rise(rows: Tensor, counts: Tensor) -> Tensor:
    """By how much attention rose from each token to the next, added up.

    Args:
        rows: [..., H, n + 1, K] attention of a token and of the n after it.
        counts: [..., n] how often each of the n counts.

    Returns:
        [..., H, K] float32.
    """
    return torch.einsum(
        "...hnk,...n->...hk", (rows[..., 1:, :] - rows[..., :-1, :]).clamp(min=0), counts.to(rows.dtype)
    )


def gaze_shift(total: Tensor, count: Tensor) -> Tensor:
    """Mean rise over content tokens and the half of the heads in which attention rose most.

    Args:
        total: [H, N] of `rise`, on visual tokens.
        count: how many tokens count.

    Returns:
        [N] float32; zeros if none counts.
    """
    heads = total.sum(1).topk(max(total.shape[0] // 2, 1)).indices
    mean: Tensor = total[heads].mean(0) / count.clamp(min=1)
    return mean


def normalised(shift: Tensor) -> Tensor:
    """[N] clipped at three standard deviations and brought to [0, 1]; zeros if constant."""
    if len(shift) < 2:
        return torch.zeros_like(shift)
    mean, deviation = shift.mean(), shift.std()
    clipped = shift.clamp(mean - 3 * deviation, mean + 3 * deviation)
    low, high = clipped.aminmax()
    return (clipped - low) / (high - low) if high > low else torch.zeros_like(shift)
