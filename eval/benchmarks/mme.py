"""MME, hallucination subset: two questions a picture, one yes and one no (arXiv 2306.13394)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError, nearest
from ..base import Item, Metric, Score, ratio
from .answers import Record, Reply, by_question, match, table
from .coco import read_coco
from .coco_questions import pairs, rivals
from .files import Problems, read_objects, read_text
from .yesno import Parser, four, words

SUBSET = ("existence", "count", "position", "color")
"""Categories of object and attribute hallucination."""

PARSERS: Mapping[str, Parser] = {"official": four, "vlmevalkit": words}

_FROM_COCO = {"existence": "existence", "number": "count", "side": "position"}
_PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Mme:
    """MME's categories from its own folders, from JSON lines, or made from COCO-format annotations.

    Per category: acc, right answers in percent; acc+, pictures with both right; score, their sum. The total adds the
    scores of the categories, up to 200 each.

    Args:
        questions: folder with one folder a category (pictures beside texts `question<TAB>answer`, or in `images` and
            `questions_answers_YN`), or JSON lines with category, image or question_id, question, answer.
        coco: folder or instances file to make existence, count and position questions from instead.
        categories: which, or a comma-separated text; by default all of `SUBSET` that are there.
        parser: `official`: the word, else the first four characters; `vlmevalkit`: one of the words yes and no.
        suffix: appended to every question, where it does not end so already.
        pictures: pictures a category made from `coco`, 30 as in MME.
        seed: of the questions made from `coco`.
    """

    questions: str | Path | None = None
    coco: str | Path | None = None
    categories: Sequence[str] | str | None = None
    parser: str = "official"
    suffix: str = " Please answer yes or no."
    pictures: int = 30
    seed: int = 0

    max_new_tokens = 16

    def __post_init__(self) -> None:
        if (self.questions is None) == (self.coco is None):
            raise UsageError("MME needs its questions (a folder or file) or a folder in COCO's format, one of the two")
        if self.parser not in PARSERS:
            raise UsageError(f"unknown parser {self.parser!r} for MME{nearest(self.parser, PARSERS)}")

    @property
    def label(self) -> str:
        """Name with the variant."""
        return f"mme[{'built' if self.coco else 'files'},{self.parser}]"

    def items(self) -> list[Item]:
        """Questions, the two of a picture one after the other.

        Raises:
            UsageError: for a picture without its yes or its no question, naming it.
        """
        rows = self._built() if self.coco is not None else _rows(Path(str(self.questions)))
        wanted = self._wanted({row["category"] for row in rows})
        items: list[Item] = []
        halves: dict[str, list[str]] = {}
        for row in rows:
            if row["category"] not in wanted:
                continue
            pair = f"{row['category']}/{Path(row['image']).stem}"
            halves.setdefault(pair, []).append(row["label"])
            asked = row["question"] if row["question"].endswith(self.suffix.strip()) else row["question"] + self.suffix
            truth = {"category": row["category"], "pair": pair, "label": row["label"]}
            truth["question"] = row["question"].removesuffix(self.suffix.strip()).strip()
            items.append(Item(f"{pair}/{len(halves[pair])}", row["image"], asked, truth))
        torn = [pair for pair, labels in halves.items() if sorted(labels) != ["no", "yes"]]
        if torn:
            raise UsageError(f"{len(torn)} pictures lack one of yes and no: {', '.join(torn[:5])}; mend the questions")
        return items

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Questions with their answers; a picture of which one half has no answer is left out and named."""
        items = self.items()
        replies = match(items, records, problems, by_question(items))
        answered: dict[str, int] = {}
        for reply in replies:
            pair = reply.item.truth["pair"]
            answered[pair] = answered.get(pair, 0) + 1
        for pair, count in answered.items():
            if count != 2:
                problems.add("pictures with one of two answers, not scored", pair)
        return [reply for reply in replies if answered[reply.item.truth["pair"]] == 2]

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Score, acc and acc+ of every category, and the total."""
        problems = problems or Problems()
        replies, parse = self.replies(records, problems), PARSERS[self.parser]
        categories = list(dict.fromkeys(reply.item.truth["category"] for reply in replies))
        right: dict[str, list[bool]] = {}
        rows, details = [], {}
        for reply in replies:
            truth, said = reply.item.truth, parse(reply.text)
            if said not in ("yes", "no"):
                problems.add("answers that are neither yes nor no, wrong", reply.item.id)
            both = right.setdefault(truth["pair"], [])
            both.append(said == truth["label"])
            name = truth["category"]
            row = {f"{kind}/{column}": 0.0 for kind in categories for column in ("items", "right", "pairs", "both")}
            row |= {f"{name}/items": 1.0, f"{name}/right": float(both[-1]), "items": 1.0, "yes": float(said == "yes")}
            if len(both) == 2:
                row |= {f"{name}/pairs": 1.0, f"{name}/both": float(all(both))}
            row |= {"unparsed": float(said not in ("yes", "no")), "empty": float(not reply.text.strip())}
            rows.append(row)
            details[reply.item.id] = {"label": truth["label"], "parsed": said}
        metrics: dict[str, Metric] = {"score": lambda sums: sum(_score(sums, name) for name in categories)}
        for name in categories:
            metrics[f"{name}/score"] = _scorer(name)
            metrics[f"{name}/acc"] = ratio(f"{name}/right", f"{name}/items")
            metrics[f"{name}/acc+"] = ratio(f"{name}/both", f"{name}/pairs")
        metrics |= {name: ratio(column, "items") for name, column in _SHARES.items()}
        return table(replies, rows, metrics, problems, details)

    def _wanted(self, there: set[str]) -> set[str]:
        if self.categories is None:
            return there & set(SUBSET)
        names = self.categories.split(",") if isinstance(self.categories, str) else self.categories
        names = [name.strip() for name in names]
        for name in names:
            if name not in there:
                raise UsageError(f"no MME category {name!r} there{nearest(name, there)}")
        return set(names)

    def _built(self) -> list[dict[str, str]]:
        coco, rng = read_coco(str(self.coco)), random.Random(self.seed)
        absent = rivals(coco.pictures)
        rows: list[dict[str, str]] = []
        made = dict.fromkeys(_FROM_COCO.values(), 0)
        for picture in rng.sample(coco.pictures, len(coco.pictures)):
            for kind, (yes, no) in pairs(picture, absent[picture.id], rng).items():
                category = _FROM_COCO[kind]
                if made[category] < self.pictures:
                    made[category] += 1
                    for question, label in ((yes, "yes"), (no, "no")):
                        row = {"category": category, "image": picture.file, "question": question, "label": label}
                        rows.append(row)
        if not rows:
            raise UsageError(f"{self.coco} allows no question: no picture with an object and an absent one")
        return sorted(rows, key=lambda row: list(made).index(row["category"]))


_SHARES = {"yes_ratio": "yes", "unparsed": "unparsed", "empty": "empty"}


def _score(sums: Mapping[str, Any], name: str) -> Any:
    parts = ((f"{name}/right", f"{name}/items"), (f"{name}/both", f"{name}/pairs"))
    return sum(100.0 * np.divide(sums[above], np.asarray(sums[below], np.float64)) for above, below in parts)


def _scorer(name: str) -> Metric:
    return lambda sums: _score(sums, name)


def _rows(source: Path) -> list[dict[str, str]]:
    if source.is_dir():
        return [row for folder in sorted(source.iterdir()) if folder.is_dir() for row in _category(folder)]
    rows = []
    for number, row in enumerate(read_objects(source, Problems()), 1):
        label = str(row.get("answer", "")).strip().lower()
        name = row.get("image") if isinstance(row.get("image"), str) else row.get("question_id")
        if not row.get("category") or not row.get("question") or not name or label not in ("yes", "no"):
            raise UsageError(f"{source}: question {number} needs category, question, image or question_id, and answer")
        rows.append(
            {"category": str(row["category"]).lower(), "image": str(name), "question": row["question"], "label": label}
        )
    return rows


def _category(folder: Path) -> list[dict[str, str]]:
    rows = []
    files = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _PICTURES}
    for path in sorted(folder.rglob("*.txt")):
        image = files.get(path.stem)
        name = str(image.relative_to(folder.parent)) if image else f"{folder.name}/{path.stem}.jpg"
        for line in read_text(path).splitlines():
            question, tab, answer = line.strip().rpartition("\t")
            if not line.strip():
                continue
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise UsageError(f"{path}: expected `question<TAB>Yes or No`, has {line!r}")
            label = answer.strip().lower()
            rows.append({"category": folder.name.lower(), "image": name, "question": question.strip(), "label": label})
    return rows
