"""Pictures blacked out where a relevance map is low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from vlmfix.view import Picture, View

Relevance = Callable[[Tensor, Picture], tuple[Tensor, float]]
"""Picture [channels, height, width] in [0, 1] and its place -> map [rows, columns], and the share of pixels to keep."""

PAD = 12
"""Zeros put around a map before it is enlarged."""


@dataclass(frozen=True)
class Masked(View):
    """Every picture black outside its most relevant pixels.

    Args:
        mean: per channel, of the normalisation.
        std: per channel.
        relevance: where to look; pictures with a constant map stay as they are.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    relevance: Relevance = field(repr=False, compare=False)

    def picture(self, pixels: Tensor, place: Picture) -> Tensor:
        """The masked picture."""
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (self.mean, self.std))
        grid, share = self.relevance((pixels.float() * std + mean).clamp(0, 1), place)
        if not float(grid.max()) > float(grid.min()):
            return pixels
        kept = most_relevant(enlarge(grid.float().cpu(), *pixels.shape[-2:]), share).to(pixels.device)
        return torch.where(kept, pixels, -mean / std)


def enlarge(grid: Tensor, height: int, width: int) -> Tensor:
    """AGLA's attention map (arXiv 2406.12718): [rows, columns] enlarged, smoothed, in [0, 1].

    A cubic B-spline through the map with zeros around it, clipped to the map's range, then a Gaussian blur.
    """
    grid = grid.double()
    grid = grid - grid.min()
    grid = grid / grid.max() if float(grid.max()) > 0 else grid
    large = spline(grid.shape[0], height) @ grid @ spline(grid.shape[1], width).T
    large = large.clamp(float(grid.min()), float(grid.max()))
    sigma = 0.02 * max(height, width)
    large = _blur(_blur(large, sigma).T, sigma).T
    large = large - large.min()
    out: Tensor = large / large.max()
    return out


def most_relevant(values: Tensor, share: float) -> Tensor:
    """[H, W] bool: values at least the one at rank floor(H W share) of the descending order."""
    ranked = values.flatten().sort(descending=True).values
    return values >= ranked[min(int(len(ranked) * share), len(ranked) - 1)]


@cache
def spline(size: int, large: int) -> Tensor:
    """[large, size] interpolation by a cubic B-spline on a half-pixel grid with zeros beyond the ends."""
    n = size + 2 * PAD
    collocation = torch.eye(n, dtype=torch.float64) * 4 / 6
    index = torch.arange(n - 1)
    collocation[index, index + 1] = collocation[index + 1, index] = 1 / 6
    collocation[0, 1] = collocation[-1, -2] = 2 / 6  # mirrored ends
    coefficients = torch.linalg.inv(collocation)[:, PAD:-PAD]
    at = (torch.arange(large, dtype=torch.float64) + 0.5) * size / large - 0.5 + PAD
    x = (at[:, None] - torch.arange(n, dtype=torch.float64)).abs()
    weights = torch.where(x < 1, 2 / 3 - x**2 + x**3 / 2, (2 - x).clamp(min=0) ** 3 / 6)
    out: Tensor = weights @ coefficients
    return out


def _blur(values: Tensor, sigma: float) -> Tensor:
    """Gaussian along the first axis, cut at four deviations, mirrored with the edge repeated."""
    reach, n = int(4 * sigma + 0.5), len(values)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / max(sigma, 1e-12)) ** 2)
    weights = weights / weights.sum()
    at = (torch.arange(n)[:, None] + offsets) % (2 * n)
    at = torch.where(at < n, at, 2 * n - 1 - at)
    matrix = torch.zeros(n, n, dtype=values.dtype).scatter_add_(1, at, weights.expand(n, -1).to(values.dtype))
    out: Tensor = matrix @ values
    return out
