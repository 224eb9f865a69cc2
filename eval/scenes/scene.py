"""Drawing lots: a split, a seed and a number give one scene, always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlmfix.errors import UsageError, nearest

from .world import IMAGE_SIZE, KINDS, NAMES, PATTERNS, SPLITS, WORLD, World

MAX_OBJECTS = 12
"""Most sprites in one picture."""


@dataclass(frozen=True)
class Object:
    """One sprite of a picture.

    Args:
        name: COCO category.
        x, y: centre, in pixels from the top left corner.
        size: side of the sprite's square before rotation, in pixels.
        angle: rotation, in radians.
        mirrored: flipped left to right.
        opacity: 0 to 1.
        hard: drawn small and faded (see `World`).
    """

    name: str
    x: float
    y: float
    size: float
    angle: float
    mirrored: bool
    opacity: float
    hard: bool

    @property
    def region(self) -> str:
        """Where the object is, as the text says it."""
        third = IMAGE_SIZE / 3
        if self.x < third:
            return "on the left"
        if self.x > 2 * third:
            return "on the right"
        if self.y < third:
            return "at the top"
        if self.y > 2 * third:
            return "at the bottom"
        return "in the middle"

    @property
    def largeness(self) -> str:
        """`large`, `small`, or empty in between."""
        return "large" if self.size > 35 else "small" if self.size < 29 else ""


@dataclass(frozen=True)
class Scene:
    """Everything a picture and its texts are made from.

    Args:
        split, seed, number: what it was drawn from; `key` joins them.
        kind: one of `KINDS`.
        objects: sprites from back to front.
        ground: phase, frequency, tilt, brightness and blend of the ground's pattern, each in 0 to 1.
        noise: standard deviation of pixel noise, in levels of 255.
        world: the dials it was drawn with.
    """

    split: str
    seed: int
    number: int
    kind: str
    objects: tuple[Object, ...]
    ground: tuple[float, ...]
    noise: float
    world: World

    @property
    def key(self) -> tuple[int, int, int]:
        """Integers that seed everything drawn for this scene."""
        return (list(SPLITS).index(self.split), self.seed, self.number)

    @property
    def counts(self) -> Counter[str]:
        """Category -> number of copies, in the order of the objects."""
        return Counter(item.name for item in self.objects)

    @property
    def frequent(self) -> tuple[str, ...]:
        """The categories that belong to this kind of scene."""
        return KINDS[self.kind].frequent


def scene(split: str, seed: int, number: int, world: World = WORLD) -> Scene:
    """Draw scene `number` of a split.

    Args:
        split: one of `SPLITS`.
        seed: any non-negative integer; another seed gives another set.
        number: place in the set, from 0.
        world: dials of difficulty.

    Returns:
        The scene; equal arguments give equal scenes on every machine.

    Raises:
        UsageError: unknown split.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split of the scenes: {split!r}{nearest(split, SPLITS)}")
    rng = np.random.default_rng([list(SPLITS).index(split), seed, number])
    kind = list(KINDS)[int(rng.integers(len(KINDS)))]
    names = _names(rng, kind, SPLITS[split], world)
    objects = _place(rng, names, world)
    noise = world.noise * float(rng.uniform(0.5, 1.5))
    return Scene(split, seed, number, kind, tuple(objects), tuple(map(float, rng.random(5))), noise, world)


def scenes(split: str, seed: int, n: int, world: World = WORLD) -> Iterator[Scene]:
    """The first `n` scenes of a split, in order."""
    return (scene(split, seed, number, world) for number in range(n))


def _names(rng: np.random.Generator, kind: str, shifted: bool, world: World) -> list[str]:
    frequent = KINDS[kind].frequent
    here = [name for name, rate in zip(frequent, world.rates(shifted), strict=True) if rng.random() < rate]
    strangers = int(rng.binomial(3, world.strangers / 3))
    if shifted:
        # As full as a typical picture: what the kind would have had, someone else takes the place of.
        expected = int(rng.binomial(len(frequent), world.cooccurrence))
        strangers += max(expected - len(here), 0)
    if not here and not strangers:
        strangers = 1
    others = [name for name in NAMES if name not in frequent]
    return here + [others[i] for i in rng.permutation(len(others))[:strangers]]


def _place(rng: np.random.Generator, names: list[str], world: World) -> list[Object]:
    wanted: list[tuple[str, bool]] = []
    for name in names:
        hard = bool(rng.random() < world.hard)
        copies = 1 if hard or rng.random() >= world.several else int(rng.integers(2, 4))
        wanted += [(name, hard)] * copies
    wanted = wanted[:MAX_OBJECTS]
    crowd = min(1.0, (7.0 / len(wanted)) ** 0.5)
    placed: list[tuple[float, float]] = []
    objects: list[Object] = []
    for name, hard in wanted:
        size = float(rng.uniform(13, 20) if hard else max(rng.uniform(24, 42) * crowd, 20))
        margin = 0.45 * size
        spots = rng.uniform(margin, IMAGE_SIZE - margin, (8, 2))
        if placed:  # the loneliest of eight spots: sprites overlap, but seldom hide each other
            distance = np.linalg.norm(spots[:, None] - np.array(placed)[None], axis=2).min(1)
            spots = spots[[int(distance.argmax())]]
        x, y = map(float, spots[0])
        placed.append((x, y))
        opacity = float(rng.uniform(*world.faded)) if hard else 1.0
        objects.append(Object(name, x, y, size, float(rng.normal(0, 0.2)), bool(rng.random() < 0.5), opacity, hard))
    return [objects[i] for i in rng.permutation(len(objects))]


def ground_code(kind: str) -> int:
    """Number of the kind's ground pattern in `PATTERNS`."""
    return PATTERNS.index(KINDS[kind].pattern)
