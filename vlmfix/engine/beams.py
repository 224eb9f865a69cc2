"""The beams of one sample: what they are, which continuations stay, what is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LOST = -1e9
"""Score of a beam that does not exist yet, as in transformers."""


@dataclass(frozen=True)
class Finished:
    """A finished sequence.

    Args:
        score: sum of log-probabilities over length ** length penalty.
        tokens: [t] generated.
        parents: [t] beam each token was put behind.
    """

    score: float
    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Beams:
    """The running beams of one sample at one length; B beams, t tokens.

    Args:
        tokens: [B, t] generated so far.
        parents: [B, t] beam each token was put behind.
        slots: [B, t] where each token lies in the cache.
        sums: [B, t] what the search's rules sum up for each token.
        scores: [B] float32 sums of log-probabilities.
        logits: [B, V] of the next token.
        history: per step since the first, the place each beam leaned on.
        finished: best first, at most B.
    """

    tokens: Tensor
    parents: Tensor
    slots: Tensor
    sums: Tensor
    scores: Tensor
    logits: Tensor
    history: tuple[tuple[int, ...], ...] = ()
    finished: tuple[Finished, ...] = ()

    @staticmethod
    def first(logits: Tensor, beams: int) -> Beams:
        """Beams after the prompt, of which only the first counts; logits are [V]."""
        none = torch.zeros(beams, 0, dtype=torch.long, device=logits.device)
        scores = torch.full((beams,), LOST, device=logits.device)
        scores[0] = 0
        return Beams(none, none, none, none.float(), scores, logits.expand(beams, -1))

    @property
    def length(self) -> int:
        """Number of tokens generated so far."""
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Chosen:
    """Continuations that run on.

    Args:
        parents: [B] beam each comes from.
        tokens: [B].
        scores: [B].
        finished: finished sequences of the sample, these included.
        done: whether the sample is complete.
    """

    parents: Tensor
    tokens: Tensor
    scores: Tensor
    finished: tuple[Finished, ...]
    done: bool


@dataclass(frozen=True)
class Keeper:
    """Chooses continuations as transformers' beam search does.

    Args:
        beams: B.
        kept: best continuations looked at, so that B are left where some end.
        length_penalty: exponent of the length.
        early_stopping: True ends a sample with B finished sequences, False where the best running beam at its present
            length is no better than the worst of them, "never" where no beam could become better.
        longest: most tokens that can be generated, for "never".
    """

    beams: int
    kept: int
    length_penalty: float
    early_stopping: bool | str
    longest: int

    def choose(self, beams: Beams, log_probs: Tensor, ends: Callable[[Tensor], Tensor]) -> Chosen:
        """One step.

        Args:
            beams: the running beams.
            log_probs: [B, V] after processors.
            ends: generated tokens [n, t + 1] -> [n] bool, whether a sequence ends there.
        """
        vocabulary = log_probs.shape[1]
        total = (log_probs + beams.scores[:, None]).flatten()
        best, index = total.topk(min(self.kept, len(total)))
        parents, tokens = index // vocabulary, index % vocabulary
        ended = ends(torch.cat([beams.tokens[parents], tokens[:, None]], 1))
        finished = self._finish(beams, parents, tokens, best, ended)
        running, order = (best + LOST * ended).sort(descending=True, stable=True)
        running, order = running[: self.beams], order[: self.beams]
        return Chosen(
            parents[order], tokens[order], running, finished, bool(ended.all()) or self._over(finished, running, beams)
        )

    def _finish(
        self, beams: Beams, parents: Tensor, tokens: Tensor, scores: Tensor, ended: Tensor
    ) -> tuple[Finished, ...]:
        """Finished sequences with those among the B best continuations that end."""
        if self.early_stopping is True and len(beams.finished) == self.beams:
            return beams.finished
        length = beams.length + 1
        new = [
            Finished(
                float(scores[i]) / length**self.length_penalty,
                torch.cat([beams.tokens[parents[i]], tokens[i : i + 1]]),
                torch.cat([beams.parents[parents[i]], parents[i : i + 1]]),
            )
            for i in ended[: self.beams].nonzero()[:, 0].tolist()
        ]
        return tuple(sorted([*beams.finished, *new], key=lambda f: -f.score)[: self.beams])

    def _over(self, finished: tuple[Finished, ...], running: Tensor, beams: Beams) -> bool:
        if len(finished) < self.beams:
            return False
        if self.early_stopping is True:
            return True
        length = self.longest if self.early_stopping == "never" and self.length_penalty > 0 else beams.length + 1
        return bool(float(running[0]) / length**self.length_penalty <= finished[-1].score)


def moved(beams: Beams, chosen: Chosen, slots: Tensor, sums: Tensor, logits: Tensor, follow: bool) -> Beams:
    """The beams one token further.

    Args:
        beams: before.
        chosen: their continuations.
        slots: [B] of the new tokens in the cache.
        sums: [B, t + 1].
        logits: [B, V] behind the new tokens.
        follow: whether history follows the beams.
    """
    parents, history = chosen.parents, beams.history
    if follow and history:
        order = parents.tolist()
        history = tuple(tuple(step[i] for i in order) for step in history)
    return replace(
        beams,
        tokens=torch.cat([beams.tokens[parents], chosen.tokens[:, None]], 1),
        parents=torch.cat([beams.parents[parents], parents[:, None]], 1),
        slots=torch.cat([beams.slots[parents], slots[:, None]], 1),
        sums=sums,
        scores=chosen.scores,
        logits=logits,
        history=history,
        finished=chosen.finished,
    )
