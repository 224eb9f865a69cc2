"""Where the plain model looks while it answers, on the grid of each picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix.attention import run
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.observing import OBSERVERS
from vlmfix.diagnostics.recording import Recording
from vlmfix.errors import Refusal
from vlmfix.hf import settings
from vlmfix.hf.batches import Batcher
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.hooks import installed
from vlmfix.hf.parts import Parts
from vlmfix.layout import Layout
from vlmfix.method import ModelFacts


class Gaze:
    """Answers greedily with the plain model and keeps the attention that each predicting token pays to the pictures.

    Args:
        batcher: of the model.
        facts: the model.
        system: system prompt of the questions.

    Raises:
        Refusal: the family's visual tokens form no grid over the picture.
    """

    def __init__(self, batcher: Batcher, facts: ModelFacts, system: str | None = None) -> None:
        self.batcher, self.facts, self.system = batcher, facts, system
        family = FAMILIES.get(batcher.parts.family)
        if family is None or family.tiled or not family.spatial or batcher.parts.embeds:
            raise Refusal(
                f"{batcher.parts.family}: its visual tokens form no grid over the whole picture "
                f"({'not known' if family is None else family.tokens}), so attention cannot be laid over it"
            )

    @torch.no_grad()
    def __call__(
        self,
        pictures: Sequence[Sequence[Image.Image]],
        questions: Sequence[str],
        layers: Sequence[int],
        new_tokens: int,
    ) -> list[list[Tensor]]:
        """As `vlmfix.method.Looker`."""
        out: list[list[Tensor]] = [[] for _ in questions]
        for batch in self.batcher.batches([[self._shaped(p) for p in row] for row in pictures], questions, self.system):
            recording, tokens = self._answered(batch.inputs, layers, new_tokens)
            layout, maps = recording.layout, recording.map
            counts = [count for _, count in self.batcher.decode(tokens, batch.inputs)]
            for row, item in enumerate(batch.items):
                for index in range(int(layout.n_images[row])):
                    at = layout.images[row] == index
                    found = maps[: counts[row], row][..., at.to(maps.device)]
                    out[item].append(found.unflatten(-1, self._grid(batch.inputs, layout, row, index)))
        return out

    def _answered(self, inputs: Mapping[str, Any], layers: Sequence[int], new_tokens: int) -> tuple[Recording, Any]:
        model = self.batcher.parts.model
        kwargs, _ = settings.plain(
            model.generation_config, {**inputs, "max_new_tokens": new_tokens, "do_sample": False}
        )
        recording = Recording(model, ["map"], layers)
        token = OBSERVERS.set((recording,))
        try:
            with installed(model) as parts:
                plain = Compiled((), (), None, self.facts)
                call = type(model).generate.__get__(model)
                tokens, _ = run.generate(parts, plain, call, kwargs, self.batcher.global_tile)
        finally:
            OBSERVERS.reset(token)
        return recording, tokens

    def _shaped(self, picture: Image.Image) -> Image.Image:
        """The picture as a square, where the family would cut a square out of it."""
        if self._flexible or picture.width == picture.height:
            return picture
        side = max(picture.size)
        return picture.resize((side, side), Image.Resampling.BICUBIC)

    @property
    def _flexible(self) -> bool:
        """Whether the grid follows the picture's proportions."""
        return flexible(self.batcher.parts)

    def _grid(self, inputs: Mapping[str, Any], layout: Layout, row: int, index: int) -> tuple[int, int]:
        tokens, number = int((layout.images[row] == index).sum()), int(layout.n_images[:row].sum()) + index
        return grid(self.batcher.parts, inputs, tokens, number)


def flexible(parts: Parts) -> bool:
    """Whether a family's grids follow the picture's proportions."""
    config = parts.model.config
    vision = getattr(config, "vision_config", None)
    merges = (getattr(c, "spatial_merge_size", None) or getattr(c, "merge_size", None) for c in (config, vision))
    return any(isinstance(merge, int) for merge in merges)


def grid(parts: Parts, inputs: Mapping[str, Any], tokens: int, number: int) -> tuple[int, int]:
    """Rows and columns of a picture's visual tokens.

    Args:
        parts: the model.
        inputs: what the processor returned.
        tokens: number of its visual tokens.
        number: place among all pictures of the batch.

    Raises:
        Refusal: the tokens form no grid that is known.
    """
    config: Any = parts.model.config
    vision: Any = getattr(config, "vision_config", None)
    sizes, patches = inputs.get("image_sizes"), inputs.get("image_grid_thw")
    found = (math.isqrt(tokens), math.isqrt(tokens))
    if isinstance(patches, Tensor):
        merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
        _, height, width = patches[number].tolist()
        found = (height // merge, width // merge)
    elif isinstance(sizes, Tensor) and isinstance(merge := getattr(config, "spatial_merge_size", None), int):
        height, width = (sizes[number] // (vision.patch_size * merge)).tolist()
        found = (height, width)
    if found[0] * found[1] != tokens:
        raise Refusal(f"{parts.family}: {tokens} visual tokens form no grid over the picture")
    return found
