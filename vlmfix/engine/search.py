"""Beam search that looks at its candidates' attention and may go back: one forward a step for all candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vlmfix import registry
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.request import OWN, Request
from vlmfix.engine.beams import Beams, Chosen, Keeper, moved
from vlmfix.errors import Refusal
from vlmfix.hf import hooks, searching
from vlmfix.hf.parts import Parts
from vlmfix.method import Search

RETURNS = "returns"
"""Name of the note, among the decoding method's own, of how often each sample went back: [rows] int64."""


def caller(parts: Parts, compiled: Compiled, generate: Callable[..., Any]) -> Callable[..., Any]:
    """What is to be called for generate: itself, or the decoding method's own search inside it.

    Args:
        parts: the model.
        compiled: the recipe.
        generate: the model's generate.

    Raises:
        Refusal: an attention method of the recipe cannot act in a search.
    """
    rules = None if compiled.decoding is None else compiled.decoding.search()
    if rules is None:
        return generate
    for method in compiled.attention:
        if method.by_distance:
            raise Refusal(
                f"{registry.name_of(method)} acts on keys by their distance, which a search lays out anew; leave it "
                f"out of a recipe with {registry.name_of(compiled.decoding)}"
            )

    def searched(**kwargs: Any) -> Any:
        request: Any = hooks.REQUEST.get()
        return searching.call(parts, generate, rules.num_beams, lambda task: Run(rules, task, request).all(), kwargs)

    return searched


@dataclass(frozen=True)
class Move:
    """What one sample does in a step.

    Args:
        beams: the beams that are continued, earlier ones after a return.
        chosen: how.
        index: [B] place of each continuation among those fed, B * N; None where some were not.
    """

    beams: Beams
    chosen: Chosen
    index: Tensor | None


@dataclass
class Sample:
    """The search of one sample.

    Args:
        rules: the method's.
        task: the call of generate.
        keeper: chooses continuations.
        prompt: [L] ids.
        beams: running.
        past: beams by their length, as far as the present hypotheses passed them.
        taken: continuations by length, [n] beams and [n] tokens.
        returns: how often the search went back to a length.
        outputs: raw logits and processed scores of the last step, [B, V] each.
    """

    rules: Search
    task: searching.Task
    keeper: Keeper
    prompt: Tensor
    beams: Beams
    done: bool = False
    past: dict[int, Beams] = field(default_factory=dict)
    taken: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    returns: dict[int, int] = field(default_factory=dict)
    outputs: tuple[Tensor, ...] = ()

    def candidates(self) -> Tensor:
        """[B, N] likeliest tokens behind each beam."""
        return self.beams.logits.topk(self.rules.candidates).indices

    def decide(self, tokens: Tensor, sums: Tensor, visual: Tensor) -> Move:
        """Chooses continuations.

        Args:
            tokens: [B, N] candidates.
            sums: [B, N, t + 1].
            visual: [B, N] share of attention that goes to pictures.
        """
        penalty, places = self.rules.judge(sums, visual)
        beams = replace(self.beams, history=(*self.beams.history, places))
        target = next((t for t in self.rules.back(beams.history) if self._reaches(t)), None)
        if target is None:
            logits = self.rules.fill(beams.logits).scatter(1, tokens, beams.logits.gather(1, tokens) - penalty)
            self.past[beams.length] = replace(beams, logits=beams.logits.to(self.task.tree.model.dtype))
            self.taken.pop(beams.length, None)
        else:
            beams, logits = self._back(target)
        chosen = self._choose(beams, logits)
        if target is not None:
            return Move(beams, chosen, None)
        matches = tokens[chosen.parents] == chosen.tokens[:, None]
        index = chosen.parents * tokens.shape[1] + matches.int().argmax(1)
        return Move(beams, chosen, index if bool(matches.any(1).all()) else None)

    def _choose(self, beams: Beams, logits: Tensor) -> Chosen:
        prompt, stopping = self.prompt, self.task.stopping

        def whole(tokens: Tensor) -> Tensor:
            return torch.cat([prompt.expand(len(tokens), -1), tokens], 1)

        scores = self.task.processors(whole(beams.tokens), logits.log_softmax(-1))
        self.outputs = beams.logits, scores
        chosen = self.keeper.choose(beams, scores, lambda tokens: stopping(whole(tokens), None))
        none = chosen.parents[:0]
        parents, tokens = self.taken.get(beams.length, (none, none))
        self.taken[beams.length] = torch.cat([parents, chosen.parents]), torch.cat([tokens, chosen.tokens])
        return chosen

    def _reaches(self, length: int) -> bool:
        return length in self.past and self.returns.get(length, 0) < self.rules.returns

    def _back(self, length: int) -> tuple[Beams, Tensor]:
        """Earlier beams, and their logits with continuations taken before as unlikely as the least likely token."""
        self.returns[length] = self.returns.get(length, 0) + 1
        beams = self.past[length]
        beams = replace(beams, logits=beams.logits.float())
        for later in [t for t in self.past if t > length]:
            del self.past[later], self.taken[later]
        parents, tokens = self.taken[length]
        logits = beams.logits.clone()
        logits[parents, tokens] = beams.logits.amin(1)[parents]
        return beams, logits


class Run:
    """The search of a batch: every sample goes its own way through the same forwards."""

    def __init__(self, rules: Search, task: searching.Task, request: Request) -> None:
        self.rules, self.task, self.tree, self.request = rules, task, task.tree, request
        self.visual = request.layers.layout.visual.to(task.tree.prompt_logits.device)
        settings = task.settings
        keeper = Keeper(
            settings.beams,
            max(2, 1 + task.end_tokens) * settings.beams,
            settings.length_penalty,
            settings.early_stopping,
            task.config.max_length - task.ids.shape[1],
        )
        self.samples = [
            Sample(rules, task, keeper, ids, Beams.first(logits, settings.beams))
            for ids, logits in zip(task.ids, self.tree.prompt_logits.float(), strict=True)
        ]
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def all(self) -> Any:
        """Steps until every sample is complete."""
        while not all(sample.done for sample in self.samples):
            self._step()
            if self.task.config.output_logits:
                self.logits.append(torch.cat([sample.outputs[0] for sample in self.samples]))
            if self.task.config.output_scores:
                self.scores.append(torch.cat([sample.outputs[1] for sample in self.samples]))
        returns = [sum(sample.returns.values()) for sample in self.samples]
        self.request.layers.notes.setdefault(OWN, {})[RETURNS] = torch.tensor(returns)
        return self._result()

    def _step(self) -> None:
        samples, count = self.samples, self.rules.candidates
        tokens = torch.stack([sample.candidates() for sample in samples])
        ancestors = [self._none() if s.done else s.beams.slots.repeat_interleave(count, 0) for s in samples]
        logits = self.tree.feed(tokens.flatten(1), ancestors).float()
        moves: dict[int, Move] = {}
        sums: dict[int, Tensor] = {}
        rows = self._rows()
        for i, sample in enumerate(samples):
            if sample.done:
                continue
            before = sample.beams.sums.repeat_interleave(count, 0)
            extended, visual = self._read(i, rows[i], ancestors[i], before)
            sums[i] = extended
            move = sample.decide(tokens[i], extended.unflatten(0, (-1, count)), visual.view(-1, count))
            sample.done = move.chosen.done
            if sample.done:
                sample.beams = replace(move.beams, finished=move.chosen.finished)
            else:
                moves[i] = move
        if not moves:
            return
        index = torch.zeros_like(tokens[:, :, 0])
        for i, move in moves.items():
            index[i] = index[i] if move.index is None else move.index
        slots = self.tree.keep(index)
        for i, move in moves.items():
            if move.index is not None:
                self._advance(i, move, slots, sums[i][move.index], logits[i, move.index])
        unfed = {i: move for i, move in moves.items() if move.index is None}
        if unfed:
            self._feed(unfed, torch.zeros_like(index))

    def _feed(self, moves: dict[int, Move], tokens: Tensor) -> None:
        """One more forward, for continuations that were no candidates."""
        ancestors = [self._none() for _ in self.samples]
        for i, move in moves.items():
            tokens[i] = move.chosen.tokens
            ancestors[i] = move.beams.slots[move.chosen.parents]
        logits = self.tree.feed(tokens, ancestors).float()
        rows = self._rows()
        slots = torch.arange(rows.shape[2] - tokens.shape[1], rows.shape[2], device=tokens.device)
        for i, move in moves.items():
            sums, _ = self._read(i, rows[i], ancestors[i], move.beams.sums[move.chosen.parents])
            self._advance(i, move, slots, sums, logits[i])

    def _advance(self, i: int, move: Move, slots: Tensor, sums: Tensor, logits: Tensor) -> None:
        follow = self.rules.history_follows_beams
        self.samples[i].beams = moved(move.beams, move.chosen, slots, sums, logits, follow)

    def _rows(self) -> Tensor:
        """[rows, Q, K] attention of the tokens fed last."""
        own = self.request.compiled.own[0]
        return self.request.layers.notes[own]["rows"].to(self.visual.device)

    def _read(self, i: int, rows: Tensor, slots: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [Q, t + 1] and shares of attention to pictures [Q], from rows [Q, K] and the ancestors' slots [Q, t]."""
        total = rows.sum(1, keepdim=True)
        own = rows.diagonal(rows.shape[1] - rows.shape[0])
        weights = torch.cat([rows.gather(1, slots), own[:, None]], 1) / total
        visual = (rows[:, : self.visual.shape[1]] * self.visual[i]).sum(1) / total[:, 0]
        return self.rules.extend(sums, weights), visual

    def _none(self) -> Tensor:
        return torch.zeros(0, 0, dtype=torch.long, device=self.visual.device)

    def _result(self) -> Any:
        device, settings = self.task.ids.device, self.task.settings
        found = [
            (i * settings.beams, one)
            for i, sample in enumerate(self.samples)
            for one in sample.beams.finished[: settings.returned]
        ]
        length = max(len(one.tokens) for _, one in found)
        tokens = torch.full((len(found), length), self.task.fill, device=device)
        indices = torch.full_like(tokens, -1)
        for row, (first, one) in enumerate(found):
            tokens[row, : len(one.tokens)] = one.tokens
            indices[row, : len(one.parents)] = one.parents + first
        prompts = self.task.ids.repeat_interleave(settings.returned, 0)
        scores = torch.tensor([one.score for _, one in found], device=device)
        return self.task.result(torch.cat([prompts, tokens], 1), scores, indices, self.logits, self.scores)
