"""Pictures transformed as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vlmfix.view import Picture, View


@dataclass(frozen=True)
class Transformed(View):
    """Every picture under a transformation drawn by seed and by its place within the row, never by the batch.

    Args:
        name: one of `TRANSFORMS`, or "random".
        seed: of the draws.
    """

    name: str = "random"
    seed: int = 0

    def picture(self, pixels: Tensor, place: Picture) -> Tensor:
        """The transformed picture."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place.index)
        names = list(TRANSFORMS)
        drawn = names[int(torch.randint(len(names), (), generator=generator))]
        return TRANSFORMS[drawn if self.name == "random" else self.name](pixels.float(), generator)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A part with half to all of each side, enlarged to the picture's size."""
    height, width = pixels.shape[-2:]
    share = _uniform(generator, 0.5, 1.0)
    rows, columns = max(1, round(share * height)), max(1, round(share * width))
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    part = pixels[:, top : top + rows, left : left + columns]
    return interpolate(part[None], (height, width), mode="bilinear", align_corners=False)[0]


def _colour(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation of the normalised pixels."""
    mean = pixels.mean()
    pixels = (pixels - mean) * _uniform(generator, 0.6, 1.4) + mean + _uniform(generator, -0.4, 0.4)
    grey = pixels.mean(0, keepdim=True)
    return grey + (pixels - grey) * _uniform(generator, 0.6, 1.4)


def _blur(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of 1 to 2 % of the shorter side."""
    sigma = max(_uniform(generator, 0.01, 0.02) * min(pixels.shape[-2:]), 0.5)
    reach = min(int(3 * sigma + 0.5), *(side - 1 for side in pixels.shape[-2:]))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2)).to(pixels.device)
    weights = weights / weights.sum()
    rows = pad(pixels[:, None], (reach, reach, reach, reach), mode="reflect")
    rows = torch.nn.functional.conv2d(rows, weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))[:, 0]


TRANSFORMS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "hflip": lambda pixels, generator: pixels.flip(-1),
    "vflip": lambda pixels, generator: pixels.flip(-2),
    "rotate": lambda pixels, generator: pixels.flip(-1, -2),
    "crop": _crop,
    "colour": _colour,
    "blur": _blur,
}
"""Name -> ([channels, height, width] normalised pixels, generator) -> pixels of the same shape."""
