"""CARVE: the picture cut down to what the question, and not any question, makes the model look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.method import LayerSpec, Looker, Method, ModelFacts, PictureMethod, check_range, resolve_layers

Array = np.ndarray


@dataclass(frozen=True)
class CARVE(PictureMethod):
    """Contrastive Attention Refinement for Visual Enhancement.

    "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", arXiv 2509.06461. The plain model answers a
    general instruction and the question; attention of every predicting token to the picture under the question is
    divided by that under the instruction, summed over layers and tokens, the largest pixels are kept, and of their
    connected regions the strongest; the rest turns black and the picture is cropped and enlarged. What answers then
    sees that picture, under whatever else the recipe holds. Context that counts and negative answers need can be lost.

    Args:
        instruction: the general instruction.
        layers: where attention is read: fractions of depth, or exact indices; published are layers 20 to 25 of 32.
        smoothing: lambda, added to the attention under the instruction; the released value is 1e-8, the paper's is not
            published.
        relative: whether lambda counts in means of that attention, so that tokens hardly looked at do not decide.
        keep: p, share of pixels kept. Published: 0.2 to 0.6.
        regions: K, the most regions kept, as the paper says. Published: 2 or 3.
        steps: tokens that count: "all", weighted by their place, "first", or "last".
        least_contrast: a picture is left as it is where the largest contrast is not this many times the median, for
            then the two instructions looked alike; ours.
        new_tokens: most tokens of the two answers.
        append: whether the picture is added behind the original, as in the released code, instead of replacing it.
    """

    instruction: str = "Write a general description of the image."
    layers: LayerSpec = (0.625, 0.8125)
    smoothing: float = 1e-8
    relative: bool = False
    keep: float = 0.2
    regions: int = 3
    steps: Literal["all", "first", "last"] = "all"
    least_contrast: float = 1.05
    new_tokens: int = 32
    append: bool = False

    def neutral(self) -> bool:
        """Everything is kept."""
        return self.keep == 1 and not self.append

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "keep", 0, 1, open_low=True)
        check_range(self, "smoothing", 0, 1e6)
        check_range(self, "least_contrast", 1, 1e6)
        for name in ("regions", "new_tokens"):
            check_range(self, name, 1, 10_000)
        if self.steps not in ("all", "first", "last"):
            raise UsageError(f"carve(steps={self.steps!r}): give 'all', 'first' or 'last'")
        return super().resolve(facts)

    def redraw(
        self, pictures: Sequence[Sequence[Image.Image]], questions: Sequence[str], look: Looker, depth: int
    ) -> list[list[Image.Image]]:
        """Every picture masked, cropped and enlarged."""
        layers = resolve_layers(self.layers, depth)
        general = look(pictures, [self.instruction] * len(questions), layers, self.new_tokens)
        asked = look(pictures, questions, layers, self.new_tokens)
        out = []
        for row, (own, other) in zip(pictures, zip(asked, general, strict=True), strict=True):
            refined = [self._refined(*parts) for parts in zip(row, own, other, strict=True)]
            out.append([*row, *refined] if self.append else refined)
        return out

    def _refined(self, picture: Image.Image, asked: Tensor, general: Tensor) -> Image.Image:
        fused = fuse(asked, general, (picture.height, picture.width), self.smoothing, self.relative, self.steps)
        if fused.max() < self.least_contrast * np.median(fused):
            return picture
        mask = strongest(fused, fused >= np.quantile(fused, 1 - self.keep), self.regions)
        return crop(picture, mask)


def fuse(
    asked: Tensor,
    general: Tensor,
    size: tuple[int, int],
    smoothing: float = 1e-8,
    relative: bool = False,
    steps: str = "all",
) -> Array:
    """The contrast of two series of attention maps, summed over layers and tokens.

    Args:
        asked: [S, L, rows, columns] attention to visual tokens, mean over heads, under the question.
        general: [S', L, rows, columns] under the general instruction.
        size: height and width of the picture.
        smoothing: lambda of section 3.3.
        relative: whether lambda counts in means of `general`.
        steps: "all" first min(S, S') tokens weighted 1, 2, ..., the "first" alone, or the "last" of them alone.

    Returns:
        [height, width] float64.
    """
    count = min(len(asked), len(general))
    if count == 0:
        raise Refusal("carve: the model generated nothing, so there is no attention to compare")
    chosen = {"all": range(count), "first": range(1), "last": range(count - 1, count)}[steps]
    total = np.zeros(size)
    for step in chosen:
        floor = smoothing * float(general[step].mean()) if relative else smoothing
        ratio = asked[step].float() / (general[step].float() + floor)
        large = torch.nn.functional.interpolate(ratio[None], size, mode="bilinear", antialias=True)[0]
        weight = step + 1 if steps == "all" else 1
        total += weight * large.double().sum(0).cpu().numpy()
    return total


def strongest(fused: Array, mask: Array, regions: int, by: str = "sum") -> Array:
    """The strongest connected regions of a mask, pixels joined by their sides.

    Args:
        fused: [height, width] strength.
        mask: [height, width] bool.
        regions: most regions kept.
        by: strength is the "sum" of `fused`, or the "area".
    """
    labels, count = components(mask)
    if count <= regions:
        return mask
    weights = fused.ravel() if by == "sum" else None
    scores = np.bincount(labels.ravel(), weights, count + 1)[1:]
    kept = np.argsort(-scores, kind="stable")[:regions] + 1
    return np.isin(labels, kept)


def without_small(mask: Array, percent: float) -> Array:
    """A mask without connected regions smaller than a percentage of its area (a variant of the released code)."""
    labels, count = components(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    large = np.flatnonzero(areas >= int(mask.sum() * percent / 100))
    return np.isin(labels, large[large > 0])


def components(mask: Array) -> tuple[Array, int]:
    """Connected regions of a mask, pixels joined by their sides.

    Returns:
        Labels [height, width] from 1, 0 outside, and their number.
    """
    height, width = mask.shape
    parents: list[int] = [0]
    labels = np.zeros((height, width), dtype=np.int64)

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    above: list[tuple[int, int, int]] = []
    for y in range(height):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask[y].astype(np.int8), [0]))))
        runs: list[tuple[int, int, int]] = []
        for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            own = 0
            for a, b, label in above:
                if a < end and start < b:
                    other = root(label)
                    if own and other != own:
                        parents[other] = own
                    own = own or other
            if not own:
                own = len(parents)
                parents.append(own)
            labels[y, start:end] = own
            runs.append((start, end, own))
        above = runs
    roots = np.array([root(label) for label in range(len(parents))])
    names, dense = np.unique(roots[1:], return_inverse=True)
    return np.concatenate(([0], dense + 1))[labels], len(names)


def crop(picture: Image.Image, mask: Array) -> Image.Image:
    """The picture black outside a mask, cut to the mask's bounds and enlarged to cover the original size."""
    black = masked(picture, mask)
    if not mask.any():
        return black
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
    cut = black.crop((left, top, right, bottom))
    factor = max(picture.width / cut.width, picture.height / cut.height)
    return cut.resize((int(cut.width * factor), int(cut.height * factor)), Image.Resampling.LANCZOS)


def masked(picture: Image.Image, mask: Array) -> Image.Image:
    """The picture with black outside a mask."""
    return Image.fromarray(np.asarray(picture.convert("RGB")) * mask[..., None].astype(np.uint8))
