"""What a loop of our own, one token a step, needs from transformers: prefill, choice of tokens, result."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlmfix.hf.calls import Call
from vlmfix.hf.draw import SeededDraw, inverse_cdf, uniforms
from vlmfix.hf.evidence import FirstToken
from vlmfix.hf.settings import stop_strings_as_criteria

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors that look at the scores alone, in tensors of fixed shape."""


@dataclass(frozen=True)
class Prefilled:
    """A read prompt.

    Args:
        logits: [B, V] raw logits of the last position, after the decoding method.
        cache: a growing cache of all rows.
        valid: [B, K] bool, slots of the caller's rows that are no padding.
    """

    logits: Tensor
    cache: Any
    valid: Tensor


@dataclass(frozen=True)
class Task(Call):
    """A call that is decoded token by token.

    Args:
        model: the module that generate runs.
        kwargs: the model's keywords.
        streamer: receives tokens as they come, if given.
    """

    model: Any
    kwargs: dict[str, Any]
    streamer: Any

    def prefill(self) -> Prefilled:
        """Reads the prompt."""
        output = self.model._prefill(self.ids, self.config, self.kwargs)
        logits = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        rows, cache = len(logits), output.past_key_values
        mask = self.kwargs.get("attention_mask")
        length = cache.get_seq_length()
        valid = torch.ones(rows, length, device=logits.device) if mask is None else mask
        return Prefilled(logits, cache, valid.bool())

    @property
    def room(self) -> int:
        """Most tokens that may be generated."""
        return int(self.stopping.max_length) - self.ids.shape[1]

    @property
    def ends(self) -> Tensor | None:
        """[n] tokens that end a sequence."""
        found = [c.eos_token_id for c in self.stopping if isinstance(c, EosTokenCriteria)]
        return found[0].to(self.ids.device).reshape(-1) if found else None

    @property
    def criteria(self) -> list[Any]:
        """Stopping criteria other than the longest length and end tokens; they read the whole text at every step."""
        return [c for c in self.stopping if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]

    def result(self, sequences: Tensor, scores: list[Tensor], logits: list[Tensor]) -> Any:
        """What generate returns; the cache is not part of it."""
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(scores) if self.config.output_scores else None,
            logits=tuple(logits) if self.config.output_logits else None,
        )


class Choice:
    """How a token is chosen from scores.

    Args:
        task: the call; nothing of its inputs is kept.
    """

    def __init__(self, task: Task) -> None:
        config = task.config
        self._sampled, self._device = bool(config.do_sample), task.ids.device
        self._later = [p for p in task.processors if not isinstance(p, FirstToken)]
        draws = [p for p in self._later if isinstance(p, SeededDraw)]
        self._draw = draws[0] if draws else None
        own = [p for p in self._later if p is not self._draw]
        self._warpers = [*own, *(() if self._draw is None else self._draw.warpers)]
        keeping = self._draw is not None and self._draw.scores is not None
        keeping = keeping or bool(self._warpers and config.return_dict_in_generate and config.output_scores)
        self.pure = all(isinstance(p, WARPERS) for p in self._warpers) and not keeping

    @property
    def key(self) -> Hashable:
        """Equal for choices that are the same function of the scores."""
        numbers = [(type(p).__name__, *sorted(vars(p).items())) for p in self._warpers] if self.pure else ()
        return self.pure, tuple(numbers), self._draw is not None, self._sampled

    def uniforms(self, count: int) -> Tensor | None:
        """[B, count] what a seeded draw compares with, from the first token on."""
        if self._draw is None or not self.pure:
            return None
        return torch.from_numpy(uniforms(self._draw.keys, 0, count)).to(self._device)

    def first(self, task: Task, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The call's first token [B] and the processed scores [B, V]."""
        return self._picked(task.processors(task.ids, scores))

    def later(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """A later token from everything before it, ids [B, n]."""
        for processor in self._later:
            scores = processor(ids, scores)
        return self._picked(scores)

    def pick(self, scores: Tensor, u: Tensor | None) -> Tensor:
        """A later token [B] where the choice is `pure`, in operations that can be captured.

        Args:
            scores: [B, V].
            u: [B] of a seeded draw.
        """
        for warper in self._warpers:
            scores = warper(None, scores)
        return self._picked(scores)[0] if u is None else inverse_cdf(scores, u)

    def _picked(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self._sampled:
            return torch.multinomial(scores.softmax(-1), 1)[:, 0], scores
        return scores.argmax(-1), scores


class Answers(BaseStreamer):  # type: ignore[misc]
    """Hands a streamer on what comes behind the prompt, which it was given before.

    Args:
        streamer: the caller's.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._began = streamer, False

    def put(self, value: Tensor) -> None:
        """Tokens [B], or the prompt [B, L] first."""
        if self._began:
            self._streamer.put(value)
        self._began = True

    def end(self) -> None:
        """Nothing follows."""
        self._streamer.end()


def again(generate: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Runs transformers' generate where `call` gave up behind the prompt.

    Args:
        generate: the model's generate.
        kwargs: the caller's keywords.
    """
    streamer = kwargs.get("streamer")
    return generate(**kwargs if streamer is None else {**kwargs, "streamer": Answers(streamer)})


def call(generate: Callable[..., Any], loop: Callable[[Task], Any], kwargs: dict[str, Any]) -> Any:
    """Runs transformers' generate with a decoding loop of ours.

    Args:
        generate: the model's generate.
        loop: the loop.
        kwargs: the caller's keywords.
    """

    def decoding(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Any:
        streamer = kwargs.get("streamer")  # generate keeps it from loops that are not its own
        return loop(Task(input_ids, logits_processor, stopping_criteria, generation_config, model, rest, streamer))

    return generate(**stop_strings_as_criteria(kwargs), custom_generate=decoding)
