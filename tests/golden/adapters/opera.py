"""OPERA's vectors: a tiny Llama searched with penalties and returns, every step compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vlmfix.api import compile_for
from vlmfix.attention import run
from vlmfix.decoders import opera
from vlmfix.decoders.opera import OPERA, LastLayerRows, column_scores
from vlmfix.engine import search
from vlmfix.engine.beams import LOST, Beams
from vlmfix.hf.hooks import installed
from vlmfix.layout import Layout
from vlmfix.recipe import Recipe

from ..cases import close, same
from ..machine import beside_another, embedded, llama

SAMPLE = search.Sample
NUMBERS = 1e-4
COLUMN, SHARE = 6e-8, 0.03
"""Column scores are stored in float16, whose smallest step is COLUMN."""

MUTANTS = {
    "mean over heads": lambda patch: patch.setattr(LastLayerRows, "watch", _averaged),
    "layer shifted": lambda patch: patch.setattr(LastLayerRows, "watches", lambda self, depth: (depth - 2,)),
    "own column left out": lambda patch: patch.setattr(OPERA, "extend", _without_own(OPERA.extend)),
    "bonus for nine tokens": lambda patch: patch.setattr(opera, "EARLY", 9),
    "rows not normalised": lambda patch: patch.setattr(search.Run, "_read", _unnormalised(search.Run._read)),
    "history follows beams": lambda patch: patch.setattr(OPERA, "history_follows_beams", True),
    "back to the place itself": lambda patch: patch.setattr(OPERA, "back", _nearer(OPERA.back)),
    "tokens taken before allowed": lambda patch: patch.setattr(SAMPLE, "_back", _forgiving(SAMPLE._back)),
}


@dataclass(frozen=True)
class Seen:
    """One step of one sample: the beams, candidates [B, N], what they are judged by and the judgement."""

    beams: Beams
    tokens: Tensor
    sums: Tensor
    visual: Tensor
    penalty: Tensor
    place: int


class Log:
    """What the samples of a batch did: steps, and returns as (step, place, length)."""

    def __init__(self) -> None:
        self.samples: list[Any] = []

    def sample(self, *args: Any) -> Any:
        """A sample of a search that keeps what it does."""

        class Watched(SAMPLE):
            def decide(self, tokens: Tensor, sums: Tensor, visual: Tensor) -> Any:
                penalty, places = self.rules.judge(sums, visual)
                self.steps.append(Seen(self.beams, tokens, sums, visual, penalty, opera.mode(places)))
                return super().decide(tokens, sums, visual)

            def _back(self, length: int) -> Any:
                self.went.append((len(self.steps) - 1, self.steps[-1].place, length))
                return super()._back(length)

        made: Any = Watched(*args)
        made.steps, made.went = [], []
        self.samples.append(made)
        return made


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    hyper, key = case["hyper"], case["key_position"]
    weights = {name.removeprefix("w."): value for name, value in arrays.items() if name.startswith("w.")}
    method = OPERA(
        alpha=hyper["penalty_weights"],
        candidates=hyper["num_attn_candidates"],
        scale=hyper["scale_factor"],
        threshold=hyper["threshold"],
        reference_rounding=True,
    )
    model, embeds = llama(case["model"], weights), arrays["inputs_embeds"]
    layout = Layout.of(_span(embeds, key["image_start"], key["image_end"] + 1))
    options = {name: hyper[name] for name in ("max_new_tokens", "num_beams", "length_penalty", "early_stopping")}
    options |= {"eos_token_id": hyper["eos_token_id"], "pad_token_id": hyper["pad_token_id"]}
    tokens, log = searched(model, method, {**embedded(embeds, layout), **options})
    expected = arrays["sequences"][:, 1:]
    same(tokens, expected, "tokens")
    _steps(case, arrays, log.samples[0])
    beside, log = searched(model, method, {**beside_another(embeds, layout), **options})
    same(beside[1:, : expected.shape[1]], expected, "tokens in a batch")
    _steps(case, arrays, log.samples[1])


def _steps(case: dict[str, Any], arrays: dict[str, Tensor], sample: Any) -> None:
    """Every step of the sample equals the stored one."""
    same(sample.went, [(r["step"], r["loc"], r["pos"]) for r in case["rollbacks"]], "returns")
    same(len(sample.steps), case["n_steps"], "steps")
    same([s.place for s in sample.steps], case["rollback_loc_of_step"], "places")
    same([s.beams.length + 1 for s in sample.steps], case["response_len_of_step"], "lengths")
    for i, step in enumerate(sample.steps):
        length, live = step.beams.length, step.beams.scores > LOST / 2
        same(step.beams.tokens, arrays["step.input_ids"][i, :, 1 : length + 1], f"beams, step {i}")
        same(step.tokens, arrays["step.candidate_tokens"][i], f"candidates, step {i}")
        close(step.beams.scores[live], arrays["step.beam_scores_in"][i][live], NUMBERS, f"scores, step {i}", 1e-6)
        logits = step.beams.logits.gather(1, step.tokens)
        close(logits, arrays["step.candidate_logits"][i], NUMBERS, f"logits, step {i}")
        close(step.visual, arrays["step.image_attention"][i], NUMBERS, f"attention to the picture, step {i}")
        columns = column_scores(step.sums, True).float()
        strongest = arrays["step.column_score_max"][i]
        close(columns.amax(-1), strongest, COLUMN, f"strongest column, step {i}", SHARE)
        same(columns.argmax(-1), arrays["step.column_argmax"][i].long(), f"place, step {i}")
        wanted = arrays["step.penalty"][i]
        penalty = step.penalty / case["hyper"]["penalty_weights"]
        close(penalty, wanted, *((NUMBERS, f"penalty, step {i}") if length < 10 else (COLUMN, "penalty", SHARE)))
        if f"colscores_fp16.{i}" in arrays:
            close(columns, arrays[f"colscores_fp16.{i}"], COLUMN, f"columns, step {i}", SHARE)
            _weights(case, step, arrays[f"attn.{i}"])


def _weights(case: dict[str, Any], step: Seen, stored: Tensor) -> None:
    """Products of the stored normalised weights [B, N, P + t + 1, P + t + 1] are those summed up along the way."""
    start = case["key_position"]["response_start"]
    window = stored[..., start:, start:].double() * case["hyper"]["scale_factor"]
    logs = torch.where(window > 0, window, 1.0).log().sum(-2)  # a column has no entries above its diagonal
    close(step.sums, logs, NUMBERS * 100, "sums of logs")
    close(step.sums[..., -1].exp(), window[..., -1, -1], NUMBERS * 100, "a candidate's own weight")


def _span(like: Tensor, start: int, end: int) -> Tensor:
    visual = torch.zeros(like.shape[:2], dtype=torch.bool)
    visual[:, start:end] = True
    return visual


@torch.no_grad()
def searched(model: Any, method: OPERA, inputs: dict[str, Any]) -> tuple[Tensor, Log]:
    """Generated tokens and what the search did."""
    log = Log()
    with installed(model, require_pictures=False) as parts, mock.patch.object(search, "Sample", log.sample):
        compiled = compile_for(parts, Recipe.of(method))
        result, _ = run.generate(parts, compiled, search.caller(parts, compiled, model.generate), inputs)
    return result, log


def _averaged(self: LastLayerRows, glance: Any, notes: dict[str, Tensor]) -> bool:
    if glance.context.past >= glance.context.layout.length:
        notes["rows"] = glance.rows(torch.arange(glance.query.shape[2])).mean(1)
    return False


def _without_own(original: Any) -> Any:
    def extend(self: OPERA, sums: Tensor, weights: Tensor) -> Tensor:
        extended: Tensor = original(self, sums, weights)
        return torch.cat([extended[..., :-1], torch.zeros_like(extended[..., -1:])], -1)

    return extend


def _unnormalised(original: Any) -> Any:
    def read(self: Any, i: int, rows: Tensor, slots: Tensor, sums: Tensor) -> Any:
        total = rows.sum(1)
        extended, visual = original(self, i, rows, slots, sums)
        return extended + total.log()[:, None], visual * total

    return read


def _nearer(original: Any) -> Any:
    return lambda self, history: original(self, history)[1:]


def _forgiving(original: Any) -> Any:
    def back(self: Any, length: int) -> Any:
        beams, _ = original(self, length)
        return beams, beams.logits.clone()

    return back
