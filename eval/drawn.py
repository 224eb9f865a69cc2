"""Scenes as a data set that needs no download: `scenes:SPLIT`, drawn once and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from .grid import Grid
from .scenes import SPLITS, WORLD, build

PREFIX = "scenes"
PICTURES = 1000
TRUTH: Mapping[str, str] = {"pope": "coco", "chair": "truth", "amber": "coco", "mme": "coco"}
"""Benchmark -> its option that takes the folder's annotations."""
FORM = f"write {PREFIX}[:SPLIT[:PICTURES[:SEED]]], as in scenes:test or scenes:tuning:200"


@dataclass(frozen=True)
class Drawn:
    """Which scenes.

    Args:
        split: one of `scenes.SPLITS`.
        pictures: number of pictures, the first ones of the split.
        seed: of the split.
    """

    split: str = "test"
    pictures: int = PICTURES
    seed: int = 0


def parse(text: str) -> Drawn | None:
    """The scenes that a text names; None if it names something else.

    Raises:
        UsageError: for an unknown split or a number that is none.
    """
    prefix, *rest = text.split(":")
    if prefix != PREFIX:
        return None
    values = dict(zip(("split", "pictures", "seed"), rest, strict=False))
    split = values.get("split", "test")
    if split not in SPLITS:
        raise UsageError(f"{text!r}: no split {split!r}{nearest(split, SPLITS)}; {FORM}")
    numbers = [values.get("pictures", str(PICTURES)), values.get("seed", "0")]
    if len(rest) > 3 or not all(number.isdecimal() for number in numbers) or int(numbers[0]) < 1:
        raise UsageError(f"{text!r} names no scenes; {FORM}")
    return Drawn(split, int(numbers[0]), int(numbers[1]))


def folder(drawn: Drawn, cache: str | Path | None = None) -> Path:
    """The folder of these scenes, drawn now unless it is there; several processes may ask at once.

    Args:
        drawn: which scenes.
        cache: where folders are kept; `VLMFIX_CACHE`, else `vlmfix` in the user's cache folder, by default.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(cache or os.environ.get("VLMFIX_CACHE") or home / "vlmfix") / PREFIX
    world = hashlib.sha256(repr(sorted(asdict(WORLD).items())).encode()).hexdigest()[:8]
    place = base / f"{drawn.split}-{drawn.pictures}-{drawn.seed}-{world}"
    if (place / "captions.json").is_file():
        return place
    try:
        base.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=base, prefix=".drawing-"))
    except OSError as error:
        raise UsageError(f"{base} cannot be written: {error.strerror}; set VLMFIX_CACHE to another folder") from error
    try:
        build(made, drawn.pictures, drawn.split, drawn.seed)
        made.chmod(0o755)
        if not place.exists():
            os.replace(made, place)
    except OSError:
        if not (place / "captions.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def filled(grid: Grid, cache: str | Path | None = None) -> Grid:
    """A grid whose `images` may be scenes, with the drawn folder and its annotations filled in.

    Args:
        grid: the grid.
        cache: see `folder`.

    Raises:
        UsageError: for a benchmark that cannot be made of scenes.
    """
    drawn = parse(grid.images)
    if drawn is None:
        return grid
    for name in grid.benchmarks:
        if name not in TRUTH:
            raise UsageError(f"the benchmark {name} cannot be made of scenes; those are {', '.join(TRUTH)}")
    place = folder(drawn, cache)
    own = {name: _options(name, drawn, place) | dict(given) for name, given in grid.benchmarks.items()}
    return replace(grid, images=str(place / "images"), benchmarks=own)


def _options(name: str, drawn: Drawn, place: Path) -> dict[str, Any]:
    options: dict[str, Any] = {TRUTH[name]: str(place)}
    if name == "pope":
        options["pictures"] = drawn.pictures
    if name == "chair":
        options |= {"max_new_tokens": 128, "scorer": "corrected"}
    return options
