"""SID: a branch that sees only the least attended visual tokens subtracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.decoders.contrast import contrast, keep, plausible
from vlmfix.errors import UsageError
from vlmfix.method import AttentionMethod, DecodingMethod, Glance, LayerContext, Method, ModelFacts, Step, check_range
from vlmfix.plan import Plan
from vlmfix.view import View

REST, UNSEEN = 0, 1


@dataclass(frozen=True)
class LeastAttended(AttentionMethod):
    """From a layer on, only the visual tokens that the current query attends least just below it are seen.

    Args:
        from_layer: A, the first layer that hides tokens; the ranking comes from layer A - 1.
        keep_lowest: R, number of visual tokens left visible; a fraction below 1 counts of the row's visual tokens.
    """

    plans_alike: ClassVar[bool] = True

    from_layer: int = 2
    keep_lowest: float = 100

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """Layer A and above."""
        return tuple(range(self.from_layer, depth))

    def watches(self, depth: int) -> tuple[int, ...]:
        """Layer A - 1."""
        return (self.from_layer - 1,)

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Ranks the visual tokens by the last query's attention, mean over heads; anew at every step."""
        layout = glance.context.layout
        last = torch.full((1,), glance.query.shape[2] - 1, device=glance.query.device)
        weights = glance.rows(last)[:, :, 0].mean(1)
        slots = glance.k_pos.clamp(max=layout.length)
        seen = torch.nn.functional.pad(layout.visual, (0, 1))[:, slots]
        ranked = weights.masked_fill(~seen, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)
        share = self.keep_lowest if self.keep_lowest >= 1 else torch.round(self.keep_lowest * layout.n_visual[:, None])
        hidden = seen & (ranked >= share)
        table = torch.zeros(layout.rows, layout.length + 1, dtype=torch.bool, device=hidden.device)
        notes["hidden"] = table.scatter(1, slots.expand(layout.rows, -1), hidden)[:, : layout.length]
        return True

    def plan(self, context: LayerContext) -> Plan | None:
        """Hides the tokens from all queries."""
        hidden = context.notes.get("hidden")
        if hidden is None:
            return None
        bias = torch.zeros(1, 1, 2, device=hidden.device)
        bias.select(-1, UNSEEN).fill_(float("-inf"))
        start = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
        return Plan(hidden.to(torch.uint8), 2, active_from=start, bias=bias)


@dataclass(frozen=True)
class SID(DecodingMethod):
    """Self-Introspective Decoding.

    "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models", arXiv 2408.02032:
    s = (1 + alpha) z - alpha z' on the plausible set, z' from a branch that sees, from layer A on, only the R visual
    tokens the current query attends least in layer A - 1; chosen anew at every step. Rows in the cache keep what they
    saw when they were written, as in the reference; without a cache all rows would see the choice of the last step, so
    answers differ.

    Args:
        alpha: weight of the contrast; 0 drops the branch and keeps the mask.
        beta: plausible set p >= beta * max p; 0 for no mask.
        from_layer: A.
        keep_lowest: R, or below 1 the fraction of visual tokens (100 of 576 by default).
    """

    same_uncached: ClassVar[bool] = False

    alpha: float = 0.5
    beta: float = 0.1
    from_layer: int = 2
    keep_lowest: float = 0.1736

    def neutral(self) -> bool:
        """Neither contrast nor mask."""
        return self.alpha == 0 and self.beta == 0

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the values."""
        check_range(self, "alpha", 0, 100)
        check_range(self, "beta", 0, 1)
        check_range(self, "keep_lowest", 0, 1e6, open_low=True)
        layer: Any = self.from_layer
        if not isinstance(layer, int) or not 1 <= layer < facts.depth or layer - 1 not in facts.heads:
            raise UsageError(
                f"sid(from_layer={layer!r}): give a layer from 1 to {facts.depth - 1} that follows a layer with "
                "attention"
            )
        return self

    def branches(self) -> tuple[View, ...]:
        """The same prompt; what differs is what its rows see."""
        return (View(),) if self.alpha else ()

    def attention(self) -> tuple[AttentionMethod, ...]:
        """The branch's blindfold."""
        return (LeastAttended(self.from_layer, self.keep_lowest, on="branches"),) if self.alpha else ()

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """The masked contrast, also when decoding greedily."""
        scores = contrast(logits, step.branches[0], self.alpha) if step.branches else logits
        return keep(scores, plausible(logits, self.beta))
