"""COCO-format annotations, read with pycocotools: pictures, objects, captions, and which objects go together."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .files import read_json


@dataclass(frozen=True)
class Thing:
    """One annotated object.

    Args:
        name: category.
        box: left, top, width, height in pixels.
        extras: other fields of the annotation.
    """

    name: str
    box: tuple[float, ...]
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One picture of an annotation file.

    Args:
        id: number.
        file: file name.
        width: in pixels; 0 if not given.
        things: annotated objects, in the file's order, crowds included.
        captions: reference captions, if any were read.
    """

    id: int
    file: str
    width: float
    things: tuple[Thing, ...]
    captions: tuple[str, ...] = ()

    @property
    def objects(self) -> list[str]:
        """Distinct categories in order of first annotation."""
        return list(dict.fromkeys(thing.name for thing in self.things))


@dataclass(frozen=True)
class Annotations:
    """An annotation file.

    Args:
        pictures: in the file's order.
        categories: names, in the file's order.
        year: year of the data set as file or file names say it; None if they do not.
        captioned: whether captions were read.
    """

    pictures: tuple[Picture, ...]
    categories: tuple[str, ...]
    year: str | None
    captioned: bool


def read_coco(source: str | Path, captions: str | Path | None = None) -> Annotations:
    """Reads a folder with `instances.json` (and `captions.json`), or an instances file.

    Args:
        source: folder or file.
        captions: captions file; in a folder, `captions.json` where there is one.

    Raises:
        UsageError: naming what is missing or not in COCO's format.
    """
    source = Path(source)
    if source.is_dir():
        folder = source
        source = _one(folder, "instances")
        if captions is None and list(folder.glob("captions*.json")):
            captions = _one(folder, "captions")
    data = _index(source, ("images", "annotations", "categories"))
    spoken = _index(captions, ("annotations",)) if captions is not None else None
    names = {row["id"]: row["name"] for row in data.dataset["categories"]}
    pictures = []
    for row in data.dataset["images"]:
        rows = data.imgToAnns.get(row["id"], [])
        unknown = [a["category_id"] for a in rows if a["category_id"] not in names]
        if unknown:
            raise UsageError(f"{source}: picture {row['id']} has the unknown category {unknown[0]}; mend `categories`")
        things = tuple(Thing(names[a["category_id"]], tuple(a.get("bbox", ())), a) for a in rows)
        said = tuple(a["caption"] for a in spoken.imgToAnns.get(row["id"], [])) if spoken else ()
        pictures.append(Picture(row["id"], str(row["file_name"]), float(row.get("width", 0)), things, said))
    if spoken and pictures and not any(picture.captions for picture in pictures):
        raise UsageError(
            f"{captions} holds captions of other pictures than {source}; give the files of one year and split"
        )
    year = _year(data.dataset.get("info"), pictures)
    return Annotations(tuple(pictures), tuple(names.values()), year, spoken is not None)


def year_of(names: Iterable[str]) -> str | None:
    """Year of a data set by the names of its pictures: COCO 2014 writes it into them, 2017 has bare numbers."""
    for name in names:
        found = re.search(r"(?:train|val|test)(20\d\d)", name)
        if found:
            return found.group(1)
        return "2017" if re.fullmatch(r"\d{12}\.jpg", Path(name).name) else None
    return None


def counts(pictures: Iterable[Sequence[str]]) -> dict[str, int]:
    """Number of pictures with each object, in order of first appearance."""
    found: dict[str, int] = {}
    for objects in pictures:
        for name in objects:
            found[name] = found.get(name, 0) + 1
    return found


def neighbours(pictures: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """Object -> the objects it shares pictures with, the most frequent first, ties in order of first appearance."""
    together: dict[str, dict[str, int]] = {}
    for objects in pictures:
        for name in objects:
            row = together.setdefault(name, {})
            for other in objects:
                if other != name:
                    row[other] = row.get(other, 0) + 1
    return {name: sorted(row, key=row.__getitem__, reverse=True) for name, row in together.items()}


def _one(folder: Path, kind: str) -> Path:
    exact, found = folder / f"{kind}.json", sorted(folder.glob(f"{kind}*.json"))
    if exact.is_file():
        return exact
    if not found:
        raise UsageError(f"{folder} has no file {kind}*.json; give a folder of COCO's annotations, or the file itself")
    if len(found) > 1:
        raise UsageError(f"{folder} has {len(found)} files {kind}*.json; name the one you mean")
    return found[0]


@dataclass(frozen=True)
class _Plain:
    """What is used of pycocotools' index, where the package is missing."""

    dataset: Any
    imgToAnns: Any  # noqa: N815 - pycocotools' name


def _index(path: str | Path, keys: Sequence[str]) -> Any:
    data = read_json(path)
    missing = [key for key in keys if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if missing:
        raise UsageError(f"{path} is not in COCO's format: no list {', '.join(missing)}")
    try:
        from pycocotools.coco import COCO
    except ImportError:
        found: dict[Any, list[Any]] = {}
        for row in data["annotations"]:
            found.setdefault(row["image_id"], []).append(row)
        return _Plain(data, found)
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _year(info: Any, pictures: Sequence[Picture]) -> str | None:
    named = year_of(picture.file for picture in pictures)
    stated = info.get("year") if isinstance(info, dict) else None
    return named or (str(stated) if stated else None)
