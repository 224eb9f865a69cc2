"""Batches of training text: several turns about one picture packed into one row, blind to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pico_model import BOS, EOS, IMAGE, PAD, VISUAL, prompt_text
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast
from vlmfix.eval import scenes
from vlmfix.eval.scenes import World

STYLES, STYLE_RATES = ("long", "short", "list"), (0.6, 0.2, 0.2)
ASKED, ASKED_RATES = scenes.QUESTIONS, (0.55, 0.12, 0.08, 0.12, 0.08, 0.05)
BLIND_RATE = 0.25
"""Share of rows with a caption, and with a question, answered without seeing the picture: language alone, which a real
decoder brings along from its pretraining."""


class Batches(IterableDataset[dict[str, Any]]):
    """Endless batches of training scenes, each scene seen once.

    Args:
        tokenizer: pico's.
        world: dials of difficulty.
        seed: seed of the scenes.
        batch: scenes per batch.
        length: text tokens per row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, world: World, seed: int, batch: int, length: int) -> None:
        self.tokenizer, self.world, self.seed, self.batch, self.length = tokenizer, world, seed, batch, length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        while True:
            yield self.make(number)
            number += step

    def make(self, number: int) -> dict[str, Any]:
        """Batch `number`: packed scenes; text, turn, position, weight [batch, length]. Turn 0 is padding, < 0 blind."""
        first = number * self.batch
        drawn = [scenes.scene("train", self.seed, first + i, self.world) for i in range(self.batch)]
        told = [self._turns(scene) for scene in drawn]
        flat = [part for turns in told for prompt, answer, _ in turns for part in (prompt, answer)]
        coded = iter(self.tokenizer.backend_tokenizer.encode_batch(flat, add_special_tokens=False))
        text, turn = np.full((self.batch, self.length), PAD), np.zeros((self.batch, self.length), np.int64)
        position, weight = np.zeros_like(turn), np.zeros((self.batch, self.length), np.float32)
        start = len(prefix(self.tokenizer))
        for row, turns in enumerate(told):
            at = 0
            for index, (_, _, blind) in enumerate(turns, 1):
                prompt, answer = next(coded).ids, [*next(coded).ids, EOS]
                prompt = [BOS, *prompt] if blind else prompt
                end = at + len(prompt) + len(answer)
                if end > self.length:
                    continue
                text[row, at:end] = prompt + answer
                turn[row, at:end] = -index if blind else index
                position[row, at:end] = np.arange(end - at) + (0 if blind else start)
                weight[row, at + len(prompt) : end] = 1.0 if len(answer) > 8 else 2.0
                at = end
        tensors = {"text": text, "turn": turn, "position": position, "weight": weight}
        return {
            "scenes": vars(scenes.pack(drawn)),
            **{name: torch.from_numpy(value) for name, value in tensors.items()},
        }

    def _turns(self, scene: scenes.Scene) -> list[tuple[str, str, bool]]:
        rng = np.random.default_rng([*scene.key, 5])
        style = STYLES[int(rng.choice(3, p=STYLE_RATES))]
        turns = [(scenes.caption(scene, style, rng), False)]
        if rng.random() < BLIND_RATE:
            turns.append((scenes.caption(scene, STYLES[int(rng.choice(3, p=STYLE_RATES))], rng), True))
        if rng.random() < BLIND_RATE:
            turns.append((scenes.question(scene, "existence", rng), True))
        for kind in rng.choice(len(ASKED), 5, p=ASKED_RATES):
            turns.append((scenes.question(scene, ASKED[int(kind)], rng), False))
        return [
            (prompt_text(turn.prompt, False) if blind else f"\n{turn.prompt} ASSISTANT:", f" {turn.answer}", blind)
            for turn, blind in turns
        ]


def prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens every turn with a picture begins with, the picture's places included."""
    before = prompt_text("").split("<image>")[0]
    return [BOS, *tokenizer.encode(before, add_special_tokens=False), *[IMAGE] * VISUAL]


def attend(turn: torch.Tensor, start: int) -> torch.Tensor:
    """Boolean mask [B, 1, S, S], S = start + length: causal within a turn; turns with a picture also see the prefix."""
    batch, length = turn.shape
    own = turn[:, :, None] == turn[:, None, :]
    causal = torch.ones(start + length, start + length, dtype=torch.bool, device=turn.device).tril()
    mask = causal.expand(batch, -1, -1).clone()
    mask[:, start:, :start] = (turn > 0)[:, :, None]
    mask[:, start:, start:] &= own
    return mask[:, None]
