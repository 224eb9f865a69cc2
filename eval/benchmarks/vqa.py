"""VQA accuracy and exact match: short answers against human answers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UsageError, nearest
from ..base import Item, Score, ratio
from .answers import Record, Reply, by_question, match, table
from .files import DATA, Problems, read_json, read_objects, read_text

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = {word.replace("'", ""): word for word in read_text(DATA / "vqa_contractions.txt").split()}


@dataclass(frozen=True)
class Vqa:
    """VQAv2, TextVQA, OK-VQA (ten human answers) and exact-match sets such as GQA.

    Accuracy of one question: mean over annotators of min(1, others with the same answer / 3) (VQA, arXiv 1505.00468).

    Args:
        questions: VQA question file (`questions`), or JSON lines with id, image, question and answers or answer.
        annotations: VQA annotation file (`annotations`), where the questions hold no answers.
        rule: `vqa`, or `exact`: equal after lower-casing and stripping the final period.
        suffix: appended to every question, the prompt of LLaVA by default.
    """

    questions: str | Path
    annotations: str | Path | None = None
    rule: Literal["vqa", "exact"] = "vqa"
    suffix: str = "\nAnswer the question using a single word or phrase."

    max_new_tokens = 16

    def __post_init__(self) -> None:
        if self.rule not in ("vqa", "exact"):
            raise UsageError(f"unknown rule {self.rule!r}{nearest(self.rule, ('vqa', 'exact'))}")

    @property
    def label(self) -> str:
        """Name with the variant."""
        return f"vqa[{self.rule}]"

    def items(self) -> list[Item]:
        """The questions.

        Raises:
            UsageError: for questions without a text or without answers, naming them.
        """
        rows = _vqa_rows(self.questions, self.annotations)
        flawed = [str(row.get("id")) for row in rows if not row.get("question") or not row.get("answers")]
        if flawed:
            raise UsageError(
                f"{len(flawed)} questions of {self.questions} have no text or no answers ({', '.join(flawed[:3])}); "
                "give the annotation file of the same split"
            )
        return [
            Item(
                str(row["id"]),
                str(row["image"]),
                row["question"] + self.suffix,
                {"question": row["question"], "answers": list(row["answers"])},
            )
            for row in rows
        ]

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Questions with their answers, found by id, or by picture and question."""
        items = self.items()
        return match(items, records, problems, by_question(items))

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Accuracy in percent."""
        problems = problems or Problems()
        replies = self.replies(records, problems)
        rate = accuracy if self.rule == "vqa" else exact_match
        rows, details = [], {}
        for reply in replies:
            value = rate(reply.text, reply.item.truth["answers"])
            rows.append({"items": 1.0, "right": value, "empty": float(not reply.text.strip())})
            details[reply.item.id] = {"accuracy": value, "parsed": normalise(reply.text)}
        metrics = {"accuracy": ratio("right", "items"), "empty": ratio("empty", "items")}
        return table(replies, rows, metrics, problems, details)


def accuracy(text: str, answers: Iterable[str]) -> float:
    """VQA accuracy of one answer, 0 to 1."""
    given, humans = normalise(text), [normalise(answer) for answer in answers]
    same = sum(human == given for human in humans)
    return sum(min(1.0, (same - (human == given)) / 3) for human in humans) / len(humans)


def exact_match(text: str, answers: Iterable[str]) -> float:
    """1 if the answer is one of the answers, lower-cased, final period stripped."""
    return float(_plain(text) in {_plain(answer) for answer in answers})


def normalise(text: str) -> str:
    """Punctuation, case, number words, articles and contractions as the VQA evaluation has them."""
    words = punctuation(re.sub(r"[\n\t]", " ", text).strip()).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def punctuation(text: str, repaired: bool = False) -> str:
    """The VQA evaluation's punctuation rule.

    A mark is deleted if it touches a blank anywhere, or the text has a comma between digits; else it becomes a blank.
    Then the first 32 periods not followed by a digit are deleted (a flag of the original code acts as that count).

    Args:
        text: any text.
        repaired: keep a period after a digit too, as the original's misspelt look-behind meant to (VLMEvalKit).
    """
    digits = re.search(r"\d,\d", text) is not None
    result = text
    for mark in _MARKS:
        result = result.replace(mark, "" if digits or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"(?<!\d)\.(?!\d)" if repaired else r"\.(?!\d)", "", result, count=32)


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").strip()


def _vqa_rows(questions: str | Path, annotations: str | Path | None) -> list[dict[str, Any]]:
    source = read_json(questions) if Path(questions).suffix == ".json" else None
    if isinstance(source, dict) and "questions" in source:
        answers = {}
        if annotations is not None:
            answers = {row["question_id"]: row for row in read_json(annotations)["annotations"]}
        pattern = f"COCO_{source['data_subtype']}_{{:012d}}.jpg" if "data_subtype" in source else "{}"
        return [
            {
                "id": row["question_id"],
                "image": pattern.format(row["image_id"]),
                "question": row["question"],
                "answers": [a["answer"] for a in answers.get(row["question_id"], {}).get("answers", [])],
            }
            for row in source["questions"]
        ]
    rows = []
    for row in read_objects(questions, Problems()):
        answers = row.get("answers", [row["answer"]] if "answer" in row else [])
        name = row.get("id", row.get("question_id"))
        rows.append({"id": name, "image": row.get("image", name), "question": row.get("question"), "answers": answers})
    return rows
