"""Scenes as files: PNGs and COCO-format annotations, which pycocotools loads and every COCO benchmark scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .scene import Object, Scene, scenes
from .text import captions
from .world import CATEGORIES, IMAGE_SIZE, KINDS, WORLD, World


def build(folder: str | Path, n: int, split: str = "test", seed: int = 0, world: World = WORLD) -> Path:
    """Write the first `n` scenes of a split.

    Args:
        folder: made if missing; gets `images/NUMBER.png`, `instances.json` and `captions.json`.
        n: number of pictures.
        split: one of `SPLITS`.
        seed: any non-negative integer.
        world: dials of difficulty.

    Returns:
        The folder. Equal arguments write equal files.

    Raises:
        UsageError: unknown split.
    """
    from .render import compose, pack  # torch only where pictures are drawn

    folder = Path(folder)
    drawn = list(scenes(split, seed, n, world))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    instances: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for start in range(0, n, 64):
        chunk = drawn[start : start + 64]
        pictures, visible = compose(pack(chunk))
        for scene, picture, shown in zip(chunk, pictures.numpy(), visible.numpy(), strict=True):
            Image.fromarray(picture.transpose(1, 2, 0)).save(folder / "images" / file_name(scene))
            instances += _instances(scene, shown, len(instances))
            texts += [
                {"image_id": scene.number, "id": 5 * scene.number + i, "caption": turn.answer}
                for i, turn in enumerate(captions(scene))
            ]
    images = [_image(scene) for scene in drawn]
    info = {"description": f"scenes, split {split}, seed {seed}", "version": "1", "license": "Apache-2.0 and OFL-1.1"}
    categories = [{"id": id_, "name": name, "supercategory": "scene"} for name, id_ in CATEGORIES.items()]
    _write(
        folder / "instances.json", {"info": info, "images": images, "annotations": instances, "categories": categories}
    )
    _write(folder / "captions.json", {"info": info, "images": images, "annotations": texts})
    return folder


def file_name(scene: Scene) -> str:
    """Name of the scene's picture."""
    return f"{scene.number:06d}.png"


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def _image(scene: Scene) -> dict[str, Any]:
    return {
        "id": scene.number,
        "file_name": file_name(scene),
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "scene": scene.kind,
        "frequent": list(KINDS[scene.kind].frequent),
    }


def _instances(scene: Scene, visible: NDArray[np.float32], first: int) -> Sequence[dict[str, Any]]:
    """COCO annotations; `visible` [K, S, S]. A hard object is annotated like any other and marked in an extra field."""
    return [
        {
            "id": first + slot + 1,
            "image_id": scene.number,
            "category_id": CATEGORIES[item.name],
            "bbox": _box(item),
            "segmentation": [_corners(item)],
            "area": round(float(visible[slot].sum()) / item.opacity, 1),
            "iscrowd": 0,
            "hard": item.hard,
        }
        for slot, item in enumerate(scene.objects)
    ]


def _corners(item: Object) -> list[float]:
    """The rotated square of the sprite, x and y in turn, kept inside the picture."""
    half, cos, sin = item.size / 2, np.cos(item.angle), np.sin(item.angle)
    points: list[float] = []
    for u, v in ((-half, -half), (half, -half), (half, half), (-half, half)):
        points += [item.x + cos * u - sin * v, item.y + sin * u + cos * v]
    return [round(float(min(max(value, 0), IMAGE_SIZE)), 1) for value in points]


def _box(item: Object) -> list[float]:
    corners = _corners(item)
    left, top, right, bottom = min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])
    return [left, top, round(right - left, 1), round(bottom - top, 1)]
