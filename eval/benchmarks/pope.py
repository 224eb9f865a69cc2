"""POPE: is there an object in the image? (Evaluating Object Hallucination in LVLMs, arXiv 2305.10355)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError, nearest
from ..base import Item, Metric, Score, ratio
from .answers import Record, Reply, by_question, match, table
from .coco import counts, neighbours, read_coco
from .files import Problems, read_objects, shipped
from .margins import METRICS as MARGIN_METRICS
from .margins import margin_columns
from .yesno import PARSERS, Verdict, asked_for, unparsed

SPLITS = ("random", "popular", "adversarial")
"""How the absent objects are chosen."""

SOURCES = ("coco", "aokvqa", "gqa")
"""Picture sources of the published question files; only `coco` is shipped."""

Question = tuple[str, str, str]
"""Picture, text, label (yes or no)."""


@dataclass(frozen=True)
class Pope:
    """POPE on published question files, on your own, or built from any COCO-format annotations.

    A question that occurs in several splits is one item, asked once and counted in each of them. Yes is the positive
    class; precision, recall and F1 are 0 where their denominator is.

    Args:
        splits: one or more of `SPLITS`, or a comma-separated text.
        source: `coco` (shipped), `aokvqa` or `gqa` (give `questions`).
        questions: question file (one split), or folder with one file a split whose name holds the split's.
        coco: folder or instances file in COCO's format to build questions from instead.
        parser: headline parser, one of `yesno.PARSERS`; the others are scored beside it.
        suffix: appended to every question; papers differ and it moves F1 by more than most methods do.
        pictures: number of pictures drawn when building.
        per_picture: questions of each answer a picture when building.
        seed: of the builder.
        max_new_tokens: token limit; the parsers need no more than the first words.
    """

    splits: Sequence[str] | str = SPLITS
    source: str = "coco"
    questions: str | Path | None = None
    coco: str | Path | None = None
    parser: str = "official"
    suffix: str = ""
    pictures: int = 500
    per_picture: int = 3
    seed: int = 0
    max_new_tokens: int = 10

    def __post_init__(self) -> None:
        names = self.splits.split(",") if isinstance(self.splits, str) else list(self.splits)
        object.__setattr__(self, "splits", tuple(name.strip() for name in names))
        for value, known in [(self.source, SOURCES), (self.parser, tuple(PARSERS))] + [
            (s, SPLITS) for s in self.splits
        ]:
            if value not in known:
                raise UsageError(f"unknown name {value!r} for POPE{nearest(value, known)}")
        if self.source != "coco" and self.questions is None:
            raise UsageError(f"the {self.source} files of POPE are not shipped; give their folder as `questions`")

    @property
    def label(self) -> str:
        """Name with the variant."""
        return f"pope[{'built' if self.coco else self.source},{self.parser}]"

    def items(self, problems: Problems | None = None) -> list[Item]:
        """Distinct questions of all splits, in order of first appearance.

        Their truth holds object, label, question and rows: split -> numbers of the rows (from 1) that ask it.
        """
        found: dict[str, Item] = {}
        for split in self.splits:
            for number, (image, text, label) in enumerate(self._rows(split, problems or Problems()), 1):
                key = f"{Path(image).stem}:{asked_for(text)}"
                item = found.get(key)
                if item is None:
                    truth = {"object": asked_for(text), "label": label, "question": text, "rows": {}}
                    item = found[key] = Item(key, image, text + self.suffix, truth)
                elif item.truth["label"] != label:
                    raise UsageError(
                        f"{key!r} is asked with both labels, in {split} row {number}; mend the question file"
                    )
                item.truth["rows"].setdefault(split, []).append(number)
        return list(found.values())

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Questions with their answers, found by id, by picture and question, or (one split) by row number."""
        items, rows = self.items(problems), {}
        if len(self.splits) == 1:
            rows = {str(n): item.id for item in items for n in item.truth["rows"][self.splits[0]]}
        return match(items, records, problems, by_question(items, rows))

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """All parser variants; figures are means over the splits, then each split's own.

        With `margin` (logit of yes minus logit of no) in every record also the AUROC of the margin and the best
        accuracy that a shifted threshold gives: what a method that only moves the threshold could reach.
        """
        problems = problems or Problems()
        replies = self.replies(records, problems)
        values = [self._columns(reply) for reply in replies]
        metrics = self._metrics()
        for reply in replies:
            if unparsed(reply.text):
                problems.add("answers with neither or both of yes and no", reply.item.id)
        for row, extra in zip(values, margin_columns(replies, problems), strict=True):
            row |= extra
        if values and values[0]["margins"]:
            metrics |= MARGIN_METRICS
        parse = PARSERS[self.parser]
        details = {
            reply.item.id: {"label": reply.item.truth["label"], **{s: p(reply.text) for s, p in PARSERS.items()}}
            | {"parsed": parse(reply.text)}
            for reply in replies
        }
        return table(replies, values, metrics, problems, details)

    def _rows(self, split: str, problems: Problems) -> Iterator[Question]:
        if self.coco is not None:
            pictures = [(p.file, p.objects) for p in read_coco(self.coco).pictures]
            chosen = choose(pictures, self.pictures, self.per_picture, self.seed)
            yield from build(chosen, split, self.per_picture, self.seed)
        elif self.questions is not None:
            yield from read_questions(_file(Path(self.questions), split, len(self.splits)), problems)
        else:
            yield from published(split)

    def _columns(self, reply: Reply) -> dict[str, float]:
        label, row = reply.item.truth["label"], {}
        for split in self.splits:
            weight = float(len(reply.item.truth["rows"].get(split, ())))
            row[f"{split}/items"] = weight
            row[f"{split}/positive"] = weight * (label == "yes")
            for name, parse in PARSERS.items():
                for column, value in _outcome(name, parse(reply.text), label).items():
                    row[f"{split}/{name}/{column}"] = weight * value
        return row | {"items": 1.0, "unparsed": float(unparsed(reply.text)), "empty": float(not reply.text.strip())}

    def _metrics(self) -> dict[str, Metric]:
        def mean(name: str, parser: str) -> Metric:
            return lambda sums: sum(_figure(sums, split, parser, name) for split in self.splits) / len(self.splits)

        def single(name: str, split: str) -> Metric:
            return lambda sums: _figure(sums, split, self.parser, name)

        metrics: dict[str, Metric] = {name: mean(name, self.parser) for name in _FIGURES}
        metrics |= {"unparsed": ratio("unparsed", "items"), "empty": ratio("empty", "items")}
        if len(self.splits) > 1:
            metrics |= {f"{split}/{name}": single(name, split) for split in self.splits for name in _FIGURES}
        metrics |= {f"{name}[{p}]": mean(name, p) for p in PARSERS if p != self.parser for name in _FIGURES}
        return metrics


_FIGURES = ("f1", "accuracy", "precision", "recall", "yes_ratio")


def _outcome(parser: str, verdict: Verdict, label: str) -> dict[str, bool]:
    """What a parser's own scorer makes of a verdict, given the label."""
    if parser in ("vcd", "clearsight"):
        right = verdict in (label, "both")
        tp, fp, fn = (label == "yes" and right, label == "no" and not right, label == "yes" and not right)
        return {"right": right, "tp": tp, "fp": fp, "fn": fn, "yes": tp or fp}
    yes, positive = verdict == "yes", label == "yes"
    if parser == "lmms_eval":  # unparsed answers leave the recall; the yes ratio is that of the labels
        return {
            "right": verdict == label, "tp": yes and positive, "fp": yes and not positive,
            "fn": positive and verdict == "no", "yes": positive,
        }  # fmt: skip
    return {
        "right": verdict == label, "tp": yes and positive, "fp": yes and not positive,
        "fn": positive and not yes, "yes": yes,
    }  # fmt: skip


def _figure(sums: Mapping[str, Any], split: str, parser: str, name: str) -> Any:
    tp, fp, fn = (sums[f"{split}/{parser}/{column}"] for column in ("tp", "fp", "fn"))
    if name in ("accuracy", "yes_ratio"):
        column = "right" if name == "accuracy" else "yes"
        return 100.0 * np.divide(sums[f"{split}/{parser}/{column}"], np.asarray(sums[f"{split}/items"], np.float64))
    below = {"precision": tp + fp, "recall": tp + fn, "f1": tp + (fp + fn) / 2}[name]
    return 100.0 * np.divide(tp, below, out=np.zeros_like(np.asarray(below, np.float64)), where=np.asarray(below) > 0)


def published(split: str) -> Iterator[Question]:
    """The 3,000 rows of a published COCO question file, in order, its one misprint included."""
    data = shipped("pope_coco")
    names, misprints, number = data["objects"], data["misprints"].get(split, {}), 0
    for picture, present, absent in zip(data["images"], data["positive"], data["negative"][split], strict=True):
        image = data["image"].format(picture)
        for yes, no in zip(present, absent, strict=True):
            for name, label in ((names[yes], "yes"), (names[no], "no")):
                number += 1
                yield image, misprints.get(str(number)) or question(name), label


def question(name: str) -> str:
    """The question about an object, with `an` before a, e, i, o, u."""
    return f"Is there a{'n' if name[0] in 'aeiou' else ''} {name} in the image?"


def read_questions(path: str | Path, problems: Problems) -> list[Question]:
    """Rows of a question file, JSON lines or one array; the old misprint `imange` is mended and named.

    Raises:
        UsageError: for a row without image, text or a yes/no label.
    """
    rows: list[Question] = []
    for number, row in enumerate(read_objects(path, problems), 1):
        label = str(row.get("label", "")).strip().lower()
        if not row.get("image") or not row.get("text") or label not in ("yes", "no"):
            raise UsageError(f"{path}: question {number} needs image, text and label yes or no, has {sorted(row)}")
        text = str(row["text"])
        if "imange" in text:
            problems.add("questions with the misprint `imange`, mended", f"{Path(path).name}:{number}")
        rows.append((str(row["image"]), text.replace("imange", "image"), label))
    if len(rows) == 2910:
        problems.add("old question file of 2,910 rows, not comparable with those of 3,000", Path(path).name)
    return rows


def choose(pictures: Sequence[tuple[str, Sequence[str]]], n: int, k: int, seed: int) -> list[tuple[str, Sequence[str]]]:
    """At most `n` of the pictures with at least `k` distinct objects, drawn without replacement.

    Raises:
        UsageError: if no picture has so many objects.
    """
    enough = [entry for entry in pictures if len(entry[1]) >= k]
    if not enough:
        raise UsageError(f"no picture has {k} distinct objects; ask fewer questions a picture (per_picture)")
    return random.Random(seed).sample(enough, min(n, len(enough)))


def build(pictures: Sequence[tuple[str, Sequence[str]]], split: str, k: int = 3, seed: int = 0) -> Iterator[Question]:
    """The reference's questions: for each picture its first k objects, each followed by an absent one.

    The absent object is the first of the split's list that is neither in the picture nor asked there already: all
    objects by number of pictures (popular), or by pictures shared with the object just asked (adversarial). `random`,
    and an exhausted list, draw from all names until one fits.

    Args:
        pictures: name and distinct objects, in annotation order.
        split: one of `SPLITS`.
        k: questions of each answer a picture.
        seed: of the draws.

    Raises:
        UsageError: if a picture leaves no absent object to ask for.
    """
    draw, number = random.Random(seed), counts(objects for _, objects in pictures)
    names = list(number)
    popular = sorted(number, key=number.__getitem__, reverse=True)
    together = neighbours(objects for _, objects in pictures)
    for image, objects in pictures:
        if len(objects) < k:
            raise UsageError(f"{image} has {len(objects)} objects, fewer than the {k} to ask for")
        if len(names) < len(objects) + k:
            raise UsageError(f"{image}: only {len(names)} names in all, too few for {k} absent ones; add pictures")
        barred = set(objects)
        for name in itertools.islice(objects, k):
            yield image, question(name), "yes"
            listed = {"random": [], "popular": popular, "adversarial": together[name]}[split]
            absent = next((other for other in listed if other not in barred), None)
            while absent is None or absent in barred:
                absent = draw.choice(names)
            barred.add(absent)
            yield image, question(absent), "no"


def _file(path: Path, split: str, splits: int) -> Path:
    if not path.is_dir():
        if splits > 1:
            raise UsageError(f"{path} holds one split; give its name (splits), or a folder with a file for each")
        return path
    found = [p for p in sorted(path.iterdir()) if split in p.name and p.suffix in (".json", ".jsonl", ".gz")]
    if len(found) != 1:
        raise UsageError(f"{path} has {len(found)} files named after the split {split!r}, expected one; name the file")
    return found[0]
