"""Composing pictures: one batched torch function, on the CPU for files and on the GPU for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample

from .scene import MAX_OBJECTS, Scene, ground_code
from .world import IMAGE_SIZE, KINDS, NAMES

CELL, COLUMNS = 48, 8
_WORD = 0xFFFFFFFF


@lru_cache
def atlas() -> Tensor:
    """Sprites in the order of `NAMES`: [categories, 4, CELL, CELL] float32, colours premultiplied by alpha."""
    with files(__package__).joinpath("atlas.png").open("rb") as handle:
        sheet = torch.from_numpy(np.array(Image.open(handle).convert("RGBA"), dtype=np.float32) / 255)
    rows = sheet.shape[0] // CELL
    cells = sheet.view(rows, CELL, COLUMNS, CELL, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)[: len(NAMES)]
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], 1)


@dataclass(frozen=True)
class Packed:
    """Scenes as tensors, K = MAX_OBJECTS slots from back to front, unused ones with opacity 0.

    Args:
        sprite: [B, K] int64, index into `NAMES`.
        place: [B, K, 6] float32: x, y, size, angle, mirrored (±1), opacity.
        pattern: [B] int64, index into `PATTERNS`.
        ground: [B, 5] float32 in 0 to 1.
        colours: [B, 2, 3] float32 in 0 to 1.
        noise: [B] float32, standard deviation in 0 to 1.
        seed: [B] int64, seeds the pixel noise.
    """

    sprite: Tensor
    place: Tensor
    pattern: Tensor
    ground: Tensor
    colours: Tensor
    noise: Tensor
    seed: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """The same on another device."""
        return Packed(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def pack(scenes: Sequence[Scene]) -> Packed:
    """Scenes -> tensors on the CPU."""
    sprite = np.zeros((len(scenes), MAX_OBJECTS), np.int64)
    place = np.zeros((len(scenes), MAX_OBJECTS, 6), np.float32)
    place[..., 2] = 1
    for row, scene in enumerate(scenes):
        for slot, item in enumerate(scene.objects):
            sprite[row, slot] = _INDEX[item.name]
            mirror = -1 if item.mirrored else 1
            place[row, slot] = (item.x, item.y, item.size, item.angle, mirror, item.opacity)
    colours = np.array([KINDS[scene.kind].colours for scene in scenes], np.float32) / 255
    seeds = [
        (split * 7919 + seed * 104729 + number * 15485863) & _WORD for split, seed, number in (s.key for s in scenes)
    ]
    return Packed(
        torch.from_numpy(sprite),
        torch.from_numpy(place),
        torch.tensor([ground_code(scene.kind) for scene in scenes]),
        torch.tensor([scene.ground for scene in scenes], dtype=torch.float32),
        torch.from_numpy(colours),
        torch.tensor([scene.noise / 255 for scene in scenes], dtype=torch.float32),
        torch.tensor(seeds, dtype=torch.int64),
    )


_INDEX = {name: i for i, name in enumerate(NAMES)}


def compose(packed: Packed, sprites: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw a batch of pictures on the device of `packed`.

    Args:
        packed: B scenes.
        sprites: `atlas()` on that device, to save the copy.

    Returns:
        (pictures [B, 3, IMAGE_SIZE, IMAGE_SIZE] uint8, visible [B, K, IMAGE_SIZE, IMAGE_SIZE] float32: how much of each
        pixel each
        slot's sprite owns after occlusion by those in front of it). The same scenes give the same pictures on any
        machine up to
        float rounding (at most one level).
    """
    device = packed.place.device
    sprites = atlas().to(device) if sprites is None else sprites
    picture = _ground(packed)
    alphas: list[Tensor] = []
    for slot in range(packed.place.shape[1]):
        layer = grid_sample(sprites[packed.sprite[:, slot]], _grid(packed.place[:, slot]), align_corners=False)
        layer = layer * packed.place[:, slot, 5].view(-1, 1, 1, 1)
        picture = layer[:, :3] + picture * (1 - layer[:, 3:])
        alphas.append(layer[:, 3])
    visible: list[Tensor] = []
    through = torch.ones_like(alphas[0])
    for alpha in reversed(alphas):
        visible.append(alpha * through)
        through = through * (1 - alpha)
    picture = picture + _noise(packed.seed) * packed.noise.view(-1, 1, 1, 1)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), torch.stack(visible[::-1], 1)


def _grid(place: Tensor) -> Tensor:
    """Sampling grid [B, S, S, 2]: for every pixel the sprite's coordinates in -1 to 1 (the affine map turned round)."""
    x, y, size, angle, mirror = place[:, :5].unbind(1)
    cos, sin = angle.cos(), angle.sin()
    centre = torch.arange(IMAGE_SIZE, device=place.device, dtype=torch.float32) + 0.5
    dx = centre.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = centre.view(1, -1, 1) - y.view(-1, 1, 1)
    scale = (2 / size).view(-1, 1, 1)
    cos, sin = cos.view(-1, 1, 1), sin.view(-1, 1, 1)
    return torch.stack([scale * mirror.view(-1, 1, 1) * (cos * dx + sin * dy), scale * (cos * dy - sin * dx)], -1)


def _ground(packed: Packed) -> Tensor:
    """Textured grounds [B, 3, S, S]: the kind's pattern between its two colours, varied by `ground`."""
    phase, frequency, tilt, light, blend = (value.view(-1, 1, 1) for value in packed.ground.unbind(1))
    centre = (torch.arange(IMAGE_SIZE, device=phase.device, dtype=torch.float32) + 0.5) / IMAGE_SIZE
    u, v = centre.view(1, 1, -1), centre.view(1, -1, 1)
    lean = (tilt - 0.5) * 0.3
    u, v = u + lean * v, v - lean * u
    rate = (4 + 4 * frequency) * torch.pi
    a, b = torch.sin(rate * u + 6 * phase), torch.sin(rate * v + 9 * phase)
    every = torch.stack(
        [
            torch.sigmoid(12 * a * b),
            torch.sigmoid(6 * a) + 0 * b,
            torch.sigmoid(9 * (b - 0.7)) + 0.15 * a,
            torch.sigmoid(30 * (v - 0.35 - 0.3 * phase)) + 0.08 * a * b,
            torch.sigmoid(10 * (a * b - 0.4)) + 0 * v,
        ],
        1,
    )  # in the order of PATTERNS
    mix = every.gather(1, packed.pattern.view(-1, 1, 1, 1).expand(-1, 1, IMAGE_SIZE, IMAGE_SIZE))
    mix = mix * (0.75 + 0.25 * blend.unsqueeze(1))
    first, second = packed.colours[:, 0, :, None, None], packed.colours[:, 1, :, None, None]
    return (first + (second - first) * mix) * (0.88 + 0.2 * light.unsqueeze(1))


def _noise(seed: Tensor) -> Tensor:
    """Triangular noise [B, 3, S, S] of unit variance by an integer hash: the same numbers on every device."""
    pixel = torch.arange(3 * IMAGE_SIZE * IMAGE_SIZE, device=seed.device, dtype=torch.int64)
    h = (pixel.view(1, -1) * 0x9E3779B1 + seed.view(-1, 1) * 0x85EBCA6B) & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & _WORD
    h = h ^ (h >> 16)
    total = (h & 0xFFFF).float() + (h >> 16).float()
    return ((total / 65535 - 1) * 6**0.5).view(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
