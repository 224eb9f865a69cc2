"""Ground truth of CHAIR: which objects a picture holds, from annotations and from what people say of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .answers import Find, Record, number_of
from .chair_words import Lexicon, lexicon
from .coco import read_coco, year_of
from .files import Problems, read_json


@dataclass(frozen=True)
class Truth:
    """Objects of pictures.

    Args:
        objects: picture number -> categories.
        files: picture number -> file name.
        source: what it was made from, part of the scorer's name.
        year: of the data set, if known.
        captioned: whether reference captions add what people name to what is annotated.
    """

    objects: Mapping[str, Sequence[str]]
    files: Mapping[str, str]
    source: str
    year: str | None = None
    captioned: bool = True

    def write(self, path: str | Path) -> None:
        """Writes a compact file that `read_truth` reads in an instant."""
        names = sorted({name for objects in self.objects.values() for name in objects})
        index = {name: place for place, name in enumerate(names)}
        data = {
            "categories": names,
            "objects": {key: [index[name] for name in objects] for key, objects in self.objects.items()},
            "files": self.files,
            "source": self.source,
            "year": self.year,
            "captioned": self.captioned,
        }
        Path(path).write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")


def read_truth(
    source: str | Path,
    captions: str | Path | None = None,
    scorer: str = "standalone",
    synonyms: Mapping[str, Sequence[str]] | None = None,
    variant: str = "A",
) -> tuple[Truth, Lexicon]:
    """Objects of pictures: annotated categories and what the scorer finds in the reference captions.

    Args:
        source: folder, instances file, or compact file.
        captions: captions file for an instances file.
        scorer: reads the captions.
        synonyms: further words.
        variant: of a compact file: `B` applies its overrides.

    Returns:
        The ground truth, and the lexicon that knows its categories.
    """
    data = read_json(source) if Path(source).is_file() else None
    if isinstance(data, dict) and "objects" in data and "annotations" not in data:
        extra = data.get(f"objects_variant_{variant.lower()}_overrides", {})
        names = data["categories"]
        objects = {key: [names[i] for i in rows] for key, rows in (data["objects"] | extra).items()}
        files = data.get("files") or {key: f"COCO_val2014_{int(key):012d}.jpg" for key in objects}
        truth = Truth(
            objects, files, data.get("source", variant), data.get("year", "2014"), data.get("captioned", True)
        )
        return truth, _lexicon(scorer, names, synonyms)
    coco = read_coco(source, captions)
    words = _lexicon(scorer, coco.categories, synonyms)
    objects, files = {}, {}
    for picture in coco.pictures:
        named = [m.object for caption in picture.captions for m in words.mentions(caption)[0]]
        objects[str(picture.id)] = list(dict.fromkeys([*map(words.category, picture.objects), *named]))
        files[str(picture.id)] = picture.file
    origin = f"instances+captions {coco.year or ''}" if coco.captioned else f"instances {coco.year or ''}"
    return Truth(objects, files, origin.strip(), coco.year, coco.captioned), words


def _lexicon(scorer: str, categories: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None) -> Lexicon:
    known = lexicon(scorer)
    extra = {name: [name] for name in categories if name not in known.objects} | dict(synonyms or {})
    return Lexicon(scorer, extra) if extra else known


def finder(truth: Truth) -> Find:
    """Items by picture number, by the number in a COCO picture's name, or by file name.

    The picture decides where a log numbers its rows; an id that is neither number nor file belongs to another
    benchmark.
    """
    stems = {Path(name).stem: key for key, name in truth.files.items()}

    def key_of(name: object) -> str | None:
        stem = Path(str(name)).stem
        number = number_of(stem) if re.fullmatch(r"COCO_\w+|\d+", stem) else None
        if stem.startswith("COCO_") and not re.search(r"\d{12}$", Path(truth.files.get(str(number), "")).stem):
            number = None  # a number of COCO's says nothing about pictures numbered otherwise
        return next((key for key in (stems.get(stem), str(name), number) if key in truth.objects), None)

    def find(record: Record) -> str | None:
        name, image = record.get("id"), record.get("image")
        own = None if name is None else key_of(name)
        if image is None or (name is not None and own is None and not str(name).isdigit()):
            return own
        return key_of(image) or own

    return find


def check_year(truth: Truth, records: Iterable[Record], problems: Problems) -> None:
    """Names answers about pictures of another year than the annotation file's."""
    for record in records:
        for name in (record.get("image"), record.get("id")):
            year = year_of([str(name)])
            if year and truth.year and year != truth.year:
                problems.add(f"answers about pictures of {year}, annotation file of {truth.year}", name)
                break
