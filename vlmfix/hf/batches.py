"""From pictures and questions to batches of model inputs, and from tokens to text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix import pictures as reading
from vlmfix.errors import UsageError
from vlmfix.hf.evidence import yes_and_no
from vlmfix.hf.parts import Parts
from vlmfix.hf.processors import render, tokenizer_of

GLOBAL_TILE = ("<global-img>",)


@dataclass(frozen=True)
class Batch:
    """Items that run together.

    Args:
        items: their indices in the caller's lists.
        inputs: what the processor returned.
        pictures: what each row's pictures are called; equal names, equal pictures.
    """

    items: list[int]
    inputs: dict[str, Any]
    pictures: list[str]


class Batcher:
    """Prepares inputs for one model.

    Args:
        parts: the model.
        processor: its processor, or None where only ready inputs will come.
    """

    def __init__(self, parts: Parts, processor: Any) -> None:
        self.parts = parts
        self.processor = processor
        self.global_tile = self._global_tile()

    @cached_property
    def yes_and_no(self) -> tuple[list[int], list[int]]:
        """Token ids that begin a yes and a no."""
        return yes_and_no(tokenizer_of(self.processor))

    @staticmethod
    def opened(entry: Any) -> list[Image.Image]:
        """The pictures of one question, read and in RGB."""
        if entry is None:
            return []
        entries = entry if isinstance(entry, list | tuple) else [entry]
        return [reading.load(e) if isinstance(e, str) or hasattr(e, "__fspath__") else reading.rgb(e) for e in entries]

    def batches(self, pictures: Sequence[Any], questions: Sequence[str], system: str | None = None) -> Iterator[Batch]:
        """One batch per number of pictures a row has."""
        rows = [self.opened(entry) for entry in pictures]
        for count in sorted({len(row) for row in rows}):
            items = [i for i, row in enumerate(rows) if len(row) == count]
            inputs = self.inputs([rows[i] for i in items], [questions[i] for i in items], system)
            yield Batch(items, inputs, [_name(pictures[i]) for i in items])

    def inputs(
        self, rows: Sequence[Sequence[Any]], questions: Sequence[str], system: str | None = None
    ) -> dict[str, Any]:
        """Runs the processor on rows with equal numbers of pictures."""
        if self.processor is None:
            raise UsageError("answer needs the processor; give it to wrap(model, processor, ...)")
        count = len(rows[0])
        texts = [render(self.processor, question, count, system) for question in questions]
        tokenizer = tokenizer_of(self.processor)
        tokenizer.padding_side = "left"
        kwargs: dict[str, Any] = {"images": [list(row) for row in rows]} if count else {}
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **kwargs)
        floating = self.parts.model.dtype
        moved = {}
        for key, value in batch.items():
            if isinstance(value, Tensor):
                value = value.to(self.parts.device)
                value = value.to(floating) if value.is_floating_point() else value
            moved[key] = value
        return moved

    def behind_picture(self, question: str) -> list[int]:
        """Token ids that stand behind the picture when a question about one picture is rendered."""
        ids: list[int] = self.inputs([[Image.new("RGB", (64, 64))]], [question])["input_ids"][0].tolist()
        visual = [i for i, token in enumerate(ids) if token in self.parts.image_ids]
        return ids[visual[-1] + 1 :] if visual else ids

    def question(self, ids: Sequence[int]) -> str:
        """The question within the token ids behind the last picture, without what the chat template puts around it."""
        start, end = self.within(ids)
        return str(tokenizer_of(self.processor).decode(list(ids)[start:end], skip_special_tokens=True)).strip()

    def within(self, ids: Sequence[int]) -> tuple[int, int]:
        """Where the question starts and ends in the token ids behind the last picture."""
        one, other = self._frames
        ids, lead, tail = list(ids), _common(one, other), _common(one[::-1], other[::-1])
        start = lead if ids[:lead] == one[:lead] else 0
        return start, len(ids) - tail if tail and ids[-tail:] == one[-tail:] else len(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text of the ids."""
        decode = tokenizer_of(self.processor).decode
        texts = [str(decode(list(ids)[:i])) for i in range(len(ids) + 1)]
        return [text[len(before) :] for before, text in itertools.pairwise(texts)]

    @cached_property
    def _frames(self) -> tuple[list[int], list[int]]:
        """Two questions with nothing in common, rendered."""
        return self.behind_picture("Where is it?"), self.behind_picture("7 of them")

    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""
        table: dict[str, int] = tokenizer_of(self.processor).get_vocab()
        return table

    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel that pixels in [0, 1] are normalised with."""
        images: Any = getattr(self.processor, "image_processor", self.processor)
        if not getattr(images, "do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        return tuple(images.image_mean), tuple(images.image_std)

    def decode(self, result: Any, inputs: dict[str, Any]) -> list[tuple[str, int]]:
        """Texts and numbers of generated tokens, the end token included."""
        sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
        prompt = inputs["input_ids"].shape[1]
        same = sequences.shape[1] >= prompt and torch.equal(
            sequences[: len(inputs["input_ids"]), :prompt], inputs["input_ids"]
        )
        new = sequences[:, prompt:] if same else sequences
        tokenizer = tokenizer_of(self.processor)
        end = self.parts.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        out = []
        for row in new.tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            out.append((tokenizer.decode(row[:stop], skip_special_tokens=True).strip(), stop))
        return out

    def _global_tile(self) -> int | None:
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None:
            return None
        vocabulary = tokenizer.get_vocab()
        return next((vocabulary[token] for token in GLOBAL_TILE if token in vocabulary), None)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _name(entry: Any) -> str:
    entries = entry if isinstance(entry, list | tuple) else [entry]
    return repr([str(e) if isinstance(e, str) or hasattr(e, "__fspath__") else id(e) for e in entries])
