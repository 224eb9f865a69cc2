"""AMBER: descriptions, and questions about existence, attributes and relations (arXiv 2311.07397)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import UsageError, nearest
from ..base import Item, Metric, Score, ratio
from . import text as text_quality
from .amber_coco import items_from_coco
from .amber_words import NOUNS, SIMILARITIES, Nouns, Similarity, flags, hallucinated
from .answers import Record, Reply, by_question, match, table
from .files import Problems, shipped
from .yesno import Parser, capital, contains, opera_pai

PARTS = ("all", "generative", "discriminative")

ANSWERS: Mapping[str, Parser] = {"exact": capital, "opera_pai": opera_pai, "contains": contains}
"""How an answer becomes Yes or No: exactly that word (AMBER itself), or as drivers of papers normalise it first."""

GROUPS = ("all", "existence", "attribute", "state", "number", "action", "relation")
"""Kinds of discriminative questions; attribute pools state, number and action."""

_TINY = 0.001
"""Start of every denominator in the reference."""


@dataclass(frozen=True)
class Amber:
    """AMBER, or questions of its kinds about any pictures in COCO's format.

    Generative figures: CHAIR, Cover, Hal, Cog. Discriminative: accuracy, precision, recall and F1 with `no` as the
    positive class. AMBER score: (100 - CHAIR + F1) / 2. Figures follow the reference's arithmetic, unrounded but for
    precision and recall, which it rounds to 0.1 before F1.

    Args:
        part: one of `PARTS`.
        similarity: `exact` (equal words), or `spacy-lg`, the reference's word vectors (needs spaCy and en_core_web_lg).
        answers: one of `ANSWERS`.
        coco: folder or instances file to make items from, see `amber_coco`; its categories are found as CHAIR finds
            them.
        pictures: number of pictures of `coco`.
        seed: of the questions made from `coco`.
        suffix: appended to every discriminative question.
    """

    part: Literal["all", "generative", "discriminative"] = "all"
    similarity: str = "exact"
    answers: str = "exact"
    coco: str | Path | None = None
    pictures: int = 500
    seed: int = 0
    suffix: str = ""

    max_new_tokens = 512

    def __post_init__(self) -> None:
        for value, known in ((self.part, PARTS), (self.similarity, SIMILARITIES), (self.answers, ANSWERS)):
            if value not in known:
                raise UsageError(f"unknown name {value!r} for AMBER{nearest(value, known)}")

    @property
    def label(self) -> str:
        """Name with the variant."""
        nouns = "table nouns" if self.coco is None else "coco"
        return f"amber[{self.part},{nouns},{self.similarity},{self.answers}]"

    def items(self) -> list[Item]:
        """Descriptions first, then questions; their truth holds kind, and words or label."""
        made = published() if self.coco is None else items_from_coco(self.coco, self.pictures, self.seed)
        wanted = {"all": (True, False), "generative": (True,), "discriminative": (False,)}[self.part]
        return [
            item
            if item.truth["kind"] == "generative"
            else Item(item.id, item.image, item.prompt + self.suffix, item.truth)
            for item in made
            if (item.truth["kind"] == "generative") in wanted
        ]

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Items with their answers, found by id, or by picture and question."""
        items = self.items()
        return match(items, records, problems, by_question(items))

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Both parts; a part without answers has no figures."""
        problems = problems or Problems()
        replies, rows, details = self.replies(records, problems), [], {}
        nouns = NOUNS["coco" if self.coco is not None else "amber"]()
        similar = SIMILARITIES[self.similarity]()
        for reply in replies:
            if reply.item.truth["kind"] == "generative":
                row, detail = self._described(reply, nouns, similar)
            else:
                row, detail = self._answered(reply, problems)
            rows.append(dict.fromkeys(_COLUMNS, 0.0) | row)
            details[reply.item.id] = detail
        kinds = {reply.item.truth["kind"] == "generative" for reply in replies}
        metrics: dict[str, Metric] = {}
        if kinds == {True, False}:
            metrics["amber"] = lambda sums: (100 - _chair(sums) + _precision_recall(sums, "all")["f1"]) / 2
        metrics |= _GENERATIVE if True in kinds else {}
        metrics |= _discriminative(self.coco is None) if False in kinds else {}
        return table(replies, rows, metrics | {"empty": ratio("empty", "items")}, problems, details)

    def _described(self, reply: Reply, nouns: Nouns, similar: Similarity) -> tuple[dict[str, float], dict[str, Any]]:
        truth = reply.item.truth
        found = nouns(reply.text)
        present, absent, wrong = flags(found, truth["truth"], truth["hallu"], truth.get("safe", ()), similar)
        row = text_quality.quality(reply.text) | {
            "items": 1.0,
            "responses": 1.0,
            "clean": float(not wrong),
            "nouns": float(len(found)),
            "wrong": float(len(wrong)),
            "truth": float(len(present)),
            "covered": float(sum(present)),
            "likely": float(len(absent)),
            "cog": float(sum(absent)),
        }
        return row, {"nouns": found, "hallucinated": hallucinated(reply.text, wrong), "covered": present, "cog": absent}

    def _answered(self, reply: Reply, problems: Problems) -> tuple[dict[str, float], dict[str, Any]]:
        kind, label = reply.item.truth["kind"], reply.item.truth["label"]
        said = ANSWERS[self.answers](reply.text)
        row = {"items": 1.0, "empty": float(not reply.text.strip()), "unparsed": float(said == "neither")}
        if said == "neither":
            problems.add("answers that are neither Yes nor No, wrong", reply.item.id)
        groups = ["all", kind] + (["attribute"] if kind in ("state", "number", "action") else [])
        for group in groups:
            row[f"{group}/items"] = 1.0
            row[f"{group}/right"] = float(said == label)
            row[f"{group}/said_no"] = float(said == "no")
            row[f"{group}/right_no"] = float(said == label == "no")
            row[f"{group}/truth_no"] = float(label == "no")
        return row, {"label": label, "parsed": said}


_COLUMNS = (
    *text_quality.quality(""),
    *("items", "responses", "clean", "nouns", "wrong", "truth", "covered", "likely", "cog", "unparsed"),
    *(f"{group}/{column}" for group in GROUPS for column in ("items", "right", "said_no", "right_no", "truth_no")),
)


def _chair(sums: Mapping[str, Any]) -> Any:
    return 100.0 * sums["wrong"] / (sums["nouns"] + _TINY)


_GENERATIVE: dict[str, Metric] = {
    "chair": _chair,
    "cover": lambda sums: 100.0 * sums["covered"] / (sums["truth"] + _TINY),
    "hal": lambda sums: 100.0 - 100.0 * sums["clean"] / (sums["responses"] + _TINY),
    "cog": lambda sums: 100.0 * sums["cog"] / (sums["likely"] + _TINY),
    "length": ratio("words", "responses", percent=False),
    "rep_4": ratio("rep_4", "responses"),
}


def _precision_recall(sums: Mapping[str, Any], group: str) -> dict[str, Any]:
    precision = np.round(100.0 * sums[f"{group}/right_no"] / (sums[f"{group}/said_no"] + _TINY), 1)
    recall = np.round(100.0 * sums[f"{group}/right_no"] / (sums[f"{group}/truth_no"] + _TINY), 1)
    tiny = _TINY if group == "existence" else 0.0001
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall + tiny)}


def _discriminative(whole: bool) -> dict[str, Metric]:
    def figure(group: str, name: str) -> Metric:
        if name == "accuracy":
            return lambda sums: 100.0 * sums[f"{group}/right"] / (sums[f"{group}/items"] + _TINY)
        return lambda sums: _precision_recall(sums, group)[name]

    groups = GROUPS if whole else ("all", "existence", "number", "relation")
    metrics = {
        (name if group == "all" else f"{group}/{name}"): figure(group, name)
        for group in groups
        for name in ("f1", "accuracy", "precision", "recall")
    }
    return metrics | {"unparsed": ratio("unparsed", "all/items")}


@functools.cache
def published() -> Sequence[Item]:
    """AMBER's 15,220 items."""
    data = shipped("amber")
    relation, safe = data["relation"], data["safe"]
    kinds = [name.removeprefix("discriminative-").removeprefix("attribute-") for name in data["types"]]
    kinds = ["existence" if kind == "hallucination" else kind for kind in kinds]

    def related(words: Sequence[str]) -> list[list[str]]:
        return [[word, *relation.get(word, ())] for word in words]

    items = [
        Item(
            str(number),
            data["image"].format(n=number),
            "Describe this image.",
            {"kind": "generative", "truth": related(present), "hallu": related(absent), "safe": safe},
        )
        for number, present, absent in data["generative"]
    ]
    truths = {number: (kinds[kind], label) for number, kind, label in data["discriminative"]}
    for number, image, question in data["queries"]:
        kind, label = truths[number]
        truth = {"kind": kind, "label": label.lower(), "question": question}
        items.append(Item(str(number), data["image"].format(n=image), question, truth))
    return items
