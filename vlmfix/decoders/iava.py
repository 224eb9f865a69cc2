"""IAVA: a branch that sees only the visual tokens a general instruction looks at and the question does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmfix.decoders.avisc import LastRowAttention
from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import Refusal, UsageError
from vlmfix.layout import Layout
from vlmfix.method import AttentionMethod, DecodingMethod, Method, ModelFacts, Step, check_range
from vlmfix.view import View
from vlmfix.views.text import Asked

LEAST_SPREAD = 1e-12
"""Below this deviation question and instruction look at the picture alike, and nothing can be told irrelevant."""


@dataclass(frozen=True)
class IAVA(DecodingMethod):
    """Instruction-Aligned Visual Attention, a reading of the abstract and of public summaries.

    "Instruction-Aligned Visual Attention for Mitigating Hallucinations in Large Vision-Language Models", arXiv
    2503.18556. With a_i the attention of the last prompt token to visual token i, mean over layers and heads, once
    under a general instruction and once under the question: tokens with a_i(general) - a_i(question) above mean +
    lambda std are irrelevant, and s = (1 + alpha) z - alpha z' on the plausible set, z' from a branch in which the
    embeddings of all other visual tokens are zeros. Layers, rows, the threshold and all defaults are our choices; no
    code was released. Pictures must stand before the question. Where question and instruction look alike (the question
    asks for a description), the branch sees the whole picture and cancels out.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        lamb: lambda, standard deviations above the mean.
        instruction: the general instruction.
        instruction_ids: all token ids that stand behind the last picture under that instruction, those of the chat
            template included; filled in from the processor.
    """

    alpha: float = 1.0
    beta: float = 0.1
    lamb: float = 1.0
    instruction: str = "Describe the content of the image."
    instruction_ids: tuple[int, ...] | None = None

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges and renders the instruction.

        Raises:
            Refusal: there is no processor and no ids were given.
        """
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        check_range(self, "lamb", -100, 100)
        if self.instruction_ids is not None or self.alpha == 0:
            return self
        if facts.rendering is None:
            raise Refusal("iava needs the processor for its instruction; give the processor, or instruction_ids")
        if not self.instruction.strip():
            raise UsageError("iava(instruction=''): give a text")
        return replace(self, instruction_ids=tuple(facts.rendering.behind_picture(self.instruction)))

    def late(self) -> bool:
        """The branch waits for the attention of both prompts."""
        return self.alpha != 0

    def probes(self) -> tuple[View, ...]:
        """The same pictures under the general instruction."""
        return (Asked(self.instruction_ids or ()),) if self.alpha else ()

    def attention(self) -> tuple[AttentionMethod, ...]:
        """The look at the last prompt row of both."""
        return (LastRowAttention(on="all"),) if self.alpha else ()

    def wiped(self, notes: dict[str, Tensor], layout: Layout, visible: int) -> Tensor:
        """All visual tokens but the irrelevant ones; none where both prompts look alike."""
        rows = torch.stack(list(notes.values())).mean(0)
        visual = layout.visual
        packed = rows.new_zeros(visual.shape[0], int(layout.n_visual.max()))
        real = torch.arange(packed.shape[1], device=packed.device) < layout.n_visual[:, None]
        packed[real] = rows[visual]  # prompts differ in length, their visual tokens only in place
        question, general, real = packed[:visible], packed[visible:], real[:visible]
        kept, clear = irrelevant_tokens(question, general, real, self.lamb)
        wiped = torch.zeros_like(visual[:visible])
        wiped[visual[:visible]] = (~kept & clear)[real]
        return wiped

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The masked contrast."""
        scores = contrast(logits, step.branches[0], self.alpha) if step.branches else logits
        return keep(scores, plausible(logits, self.beta))


def irrelevant_tokens(question: Tensor, general: Tensor, real: Tensor, lamb: float) -> tuple[Tensor, Tensor]:
    """Visual tokens that a general instruction looks at and the question does not.

    Args:
        question: [B, N] attention to each visual token under the question.
        general: [B, N] under the general instruction.
        real: [B, N] bool, tokens that are not padding.
        lamb: standard deviations above the mean.

    Returns:
        [B, N] bool, and [B, 1] bool where the two differ at all.
    """
    delta = (general.float() - question.float()) * real
    n = real.sum(1, keepdim=True).clamp(min=1)
    mean = delta.sum(1, keepdim=True) / n
    spread = (((delta - mean) * real).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return real & (delta > mean + lamb * spread), spread > LEAST_SPREAD
