"""Pictures noised by a diffusion schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vlmfix.view import View

STEPS = 1000


@dataclass(frozen=True)
class Noised(View):
    """Every picture replaced by sqrt(abar_t) v + sqrt(1 - abar_t) eps, v its normalised pixels.

    The noise depends on the seed and on a picture's place within its row alone, never on the batch.

    Args:
        step: t of the schedule, 0..999.
        seed: seed of the noise.
    """

    step: int = 500
    seed: int = 0

    def pixels(self, pixels: Tensor, picture: int) -> Tensor:
        """Noised tiles; every tile has its own draw."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + picture)
        tiles = pixels if pixels.dim() == 4 else pixels[None]
        eps = torch.stack([torch.randn(tile.shape, generator=generator) for tile in tiles])
        return add_noise(pixels, eps.view(pixels.shape).to(pixels.device), self.step)


def add_noise(pixels: Tensor, eps: Tensor, step: int) -> Tensor:
    """The forward diffusion of VCD (arXiv 2311.16922).

    Pixels and eps of one shape -> noised pixels in the pixels' dtype.
    """
    keep, add = coefficients(step)
    return (keep * pixels.float() + add * eps.float()).to(pixels.dtype)


@cache
def coefficients(step: int) -> tuple[float, float]:
    """sqrt(abar_t) and sqrt(1 - abar_t) of the sigmoid schedule over 1000 steps; t = 0 already applies one step."""
    betas = torch.sigmoid(torch.linspace(-6, 6, STEPS)) * (0.5e-2 - 1e-5) + 1e-5
    abar = (1 - betas).cumprod(0)[step]
    return float(abar.sqrt()), float((1 - abar).sqrt())
