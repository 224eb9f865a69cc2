"""Tiny random VLMs: what a family must declare, and how a batch of prompts is put together from it.

Every family shares one vocabulary: ids below `TEXT` are special (padding, placeholders, separators), text is drawn
from the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import pad

PAD, BOS, EOS, IMAGE, VIDEO, START, END, SEP, ROW, GLOBAL = range(10)
TEXT = 16
VOCAB = 256

DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
"""The text decoder of most families: grouped queries, head size 16."""

TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
"""The vision tower of most families."""


T = TypeVar("T")


class Draw:
    """Source of one picture: its shape depends on (row key, index), its pixels on the seed too."""

    def __init__(self, seed: int, key: int, index: int, siblings: int, variant: int = 0) -> None:
        self.index, self.variety = index, key + index
        self.siblings = siblings
        self._generator = torch.Generator().manual_seed(((seed * 131 + key) * 31 + index) * 7 + variant)

    def pixels(self, *shape: int) -> Tensor:
        """Normal random numbers of a shape."""
        return torch.randn(shape, generator=self._generator)

    def choose(self, options: Sequence[T]) -> T:
        """One of the options, so that neighbouring rows and pictures differ in size."""
        return options[self.variety % len(options)]


@dataclass(frozen=True)
class Picture:
    """One picture as the processor would render it.

    Args:
        ids: tokens it occupies in the prompt.
        tensors: what the model gets, leading axis = pictures, tiles or patches.
        visual: which of `ids` are visual tokens; those equal to `IMAGE` by default.
    """

    ids: list[int]
    tensors: dict[str, Tensor]
    visual: list[bool] | None = None

    def mask(self) -> list[bool]:
        return [token == IMAGE for token in self.ids] if self.visual is None else self.visual


@dataclass(frozen=True)
class Prompt:
    """One row: tokens, the picture each belongs to (-1 text), its pictures."""

    key: int
    ids: list[int]
    images: list[int]
    pictures: list[Picture]


def released(version: str) -> bool:
    """Whether the installed transformers is at least a version."""
    return Version(metadata.version("transformers")) >= Version(version)


Join = Callable[[Sequence[Prompt], "Inputs"], Mapping[str, Tensor]]


class Inputs(dict[str, Tensor]):
    """What a processor would return, with the truth about it beside.

    Args:
        images: [B, K] index within its row of the picture a visual token belongs to, -1 elsewhere.
    """

    def __init__(self, tensors: Mapping[str, Tensor], images: Tensor) -> None:
        super().__init__(tensors)
        self.images = images


def concatenated(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """All pictures of the batch one after the other; no tensors when there is none."""
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    names = pictures[0].tensors if pictures else ()
    return {name: torch.cat([picture.tensors[name] for picture in pictures]) for name in names}


def per_row(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """Pictures of a row on a second axis, [B, most, ...], short rows filled with zeros."""
    names = next((list(p.pictures[0].tensors) for p in prompts if p.pictures), [])
    result = {}
    for name in names:
        rows = [torch.cat([x.tensors[name] for x in p.pictures]) if p.pictures else None for p in prompts]
        shape = next(row.shape[1:] for row in rows if row is not None)
        dtype = next(row.dtype for row in rows if row is not None)
        most = max(len(row) for row in rows if row is not None)
        full = torch.zeros(len(rows), most, *shape, dtype=dtype)
        for i, row in enumerate(rows):
            if row is not None:
                full[i, : len(row)] = row
        result[name] = full
    return result


def padded_tiles(prompts: Sequence[Prompt], inputs: Inputs) -> dict[str, Tensor]:
    """As `concatenated`, with the second axis of `pixel_values` (tiles) filled up to the longest."""
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    most = max((p.tensors["pixel_values"].shape[1] for p in pictures), default=0)

    def fill(picture: Picture) -> Picture:
        tiles = picture.tensors["pixel_values"]
        tiles = pad(tiles, (0, 0) * (tiles.dim() - 2) + (0, most - tiles.shape[1]))
        return Picture(picture.ids, {**picture.tensors, "pixel_values": tiles})

    return concatenated([Prompt(p.key, p.ids, p.images, [fill(x) for x in p.pictures]) for p in prompts], inputs)


@dataclass(frozen=True)
class Family:
    """One family as data, and the two functions that only it can know.

    Args:
        name: transformers' model_type.
        config: keyword arguments of the family's config class.
        picture: renders one picture.
        join: brings the pictures of a batch together.
        types: names of [B, K] tensors that are 1 at visual tokens and 0 elsewhere.
        zeros: names of [B, K] tensors that are 0 everywhere.
        images: the numbers of pictures a row may have.
        left_padding: a left-padded row generates what the row alone generates.
        uneven: a row equals the row alone also where rows of the batch differ in their number of pictures.
        beams_until: the first release in which beam search and several return sequences fail, None if in none.
        static_since: the oldest release in which generation with a static cache works, None if in none.
        mask: how prompt rows see each other, in the words of `vlmfix.layout.MaskKind`.
        sees_ahead: some tokens before a picture see it.
        cached: decoding with a cache equals decoding without (false where the prompt sees itself in both directions).
        grouped: fewer key than query heads.
        min_transformers: the oldest release in which this builds.
    """

    name: str
    config: dict[str, Any]
    picture: Callable[[Draw], Picture]
    join: Join = concatenated
    types: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()
    images: tuple[int, ...] = (0, 1, 2)
    left_padding: bool = True
    uneven: bool = True
    beams_until: str | None = None
    static_since: str | None = "5.17"
    mask: str = "causal"
    sees_ahead: bool = False
    cached: bool = True
    grouped: bool = True
    min_transformers: str = "5.17"


@dataclass(frozen=True)
class TinyVLM:
    """A tiny random model and the prompts for it.

    Args:
        family: transformers' model_type.
        model: float32, evaluation mode, ends no sequence by itself.
        spec: what the family declares.
    """

    family: str
    model: Any
    spec: Family

    @property
    def rows(self) -> tuple[int, int, int]:
        """A batch of three rows that shows every number of pictures the family takes in one batch."""
        if not self.spec.uneven:
            return (1, 1, 1)
        counts = sorted(self.spec.images, reverse=True)
        return tuple((counts * 3)[:3])

    def inputs(
        self,
        rows: Sequence[int | None],
        seed: int = 0,
        text_length: int | Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
        changed: Collection[tuple[int, int]] = (),
    ) -> Inputs:
        """What a processor would return for a left-padded batch of prompts.

        A row depends on (seed, its key, its number of pictures) only: `inputs([rows[i]], keys=[i])` is row i alone.

        Args:
            rows: number of pictures of each row.
            seed: of pixels and text.
            text_length: tokens of the question, the same or one per row; different per key by default.
            keys: what a row's content depends on instead of its place; places by default.
            changed: (row, picture) pairs that get other pixels of the same size.

        Returns:
            input_ids and attention_mask [B, K], and everything else the model takes.
        """
        keys = range(len(rows)) if keys is None else keys
        prompts = []
        for i, (count, key) in enumerate(zip(rows, keys, strict=True)):
            if (count or 0) not in self.spec.images:
                raise ValueError(f"{self.family} takes rows with {self.spec.images} pictures, not {count}")
            length = text_length if isinstance(text_length, int) else text_length and text_length[i]
            draws = [Draw(seed, key, j, count or 0, int((i, j) in changed)) for j in range(count or 0)]
            prompts.append(self._prompt(key, seed, length or 4 + key * 3 % 8, [self.spec.picture(d) for d in draws]))
        longest = max(len(prompt.ids) for prompt in prompts)

        def stack(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            return torch.stack([pad(torch.tensor(v), (longest - len(v), 0), value=fill) for v in values])

        images = stack([prompt.images for prompt in prompts], -1)
        inputs = Inputs({"input_ids": stack([p.ids for p in prompts], PAD)}, images)
        inputs["attention_mask"] = stack([[1] * len(p.ids) for p in prompts], 0)
        inputs |= {name: (images >= 0).long() for name in self.spec.types}
        inputs |= {name: torch.zeros_like(images) for name in self.spec.zeros}
        inputs |= self.spec.join(prompts, inputs)
        return inputs

    @property
    def beams(self) -> bool:
        """Whether beam search and several return sequences work in the installed transformers."""
        return self.spec.beams_until is None or not released(self.spec.beams_until)

    @property
    def static(self) -> bool:
        """Whether generation with a static cache works in the installed transformers."""
        return self.spec.static_since is not None and released(self.spec.static_since)

    def expected_visual(self, inputs: Inputs) -> Tensor:
        """[B, K] bool, positions that were built as visual tokens."""
        return inputs.images >= 0

    def expected_images(self, inputs: Inputs) -> Tensor:
        """[B, K] index within its row of the picture a visual token belongs to, -1 elsewhere."""
        return inputs.images

    @staticmethod
    def _prompt(key: int, seed: int, length: int, pictures: list[Picture]) -> Prompt:
        generator = torch.Generator().manual_seed(seed * 7919 + key)
        words = torch.randint(TEXT, VOCAB, (length + 2 + len(pictures),), generator=generator).tolist()
        ids, images = [BOS, *words[:2]], [-1] * 3
        for j, picture in enumerate(pictures):
            ids += [*picture.ids, words[2 + j]]
            images += [*(j if visual else -1 for visual in picture.mask()), -1]
        ids += words[2 + len(pictures) :]
        images += [-1] * length
        return Prompt(key, ids, images, pictures)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dictionary with some of its leaves replaced."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, dict) else value
    return result


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int, special: int = TEXT) -> None:
    """Draws weights such that activations neither vanish nor saturate and greedy margins are wide.

    Matrices get a deviation of 1/sqrt(inputs), embeddings 0.5; vectors are moved a little from their initial value.
    The first `special` tokens get the logit 0.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gate" in name and parameter.numel() == 1:
            parameter.fill_(0.5)
        elif name.endswith("A_log"):
            parameter.fill_(-2)  # linear attention that remembers; one that forgets at once divides by almost nothing
        elif parameter.dim() < 2:
            parameter.add_(noise * 0.1)
        elif id(parameter) in embeddings:
            parameter.copy_(noise * 0.5)
        elif head is not None and parameter is head.weight:
            parameter.copy_(noise * 3 / parameter.shape[1] ** 0.5)
            parameter[:special] = 0  # never the likeliest, so special tokens are not generated
        else:
            inputs = parameter[0].numel() if parameter.dim() != 3 else max(parameter.shape[1:])
            parameter.copy_(noise / inputs**0.5)


def construct(spec: Family, seed: int, over: Mapping[str, Any], special: int = TEXT) -> TinyVLM:
    """Builds a new model of a family."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    config = AutoConfig.for_model(spec.name, **merged(spec.config, over))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    randomise(model, seed, special)
    for module in (model, getattr(model, "language_model", None)):
        if module is not None and hasattr(module, "generation_config"):
            module.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
    return TinyVLM(spec.name, model, spec)
