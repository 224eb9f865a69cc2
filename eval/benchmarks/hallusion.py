"""HallusionBench by rule: questions that come in groups, right only if all of a group are (arXiv 2310.14566)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UsageError, nearest
from ..base import Item, Metric, Score, ratio
from .answers import Record, Reply, by_question, match, table
from .files import Problems, read_objects
from .yesno import Parser, contains, words

PARSERS: Mapping[str, Parser] = {"words": words, "contains": contains}
"""`words`: one of the words yes and no, as VLMEvalKit; `contains`: `yes` anywhere, as lmms-eval without a judge."""

_KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id", "question", "gt_answer")


@dataclass(frozen=True)
class Hallusion:
    """HallusionBench without a judge; an answer that says neither yes nor no is wrong.

    aAcc: right questions. qAcc: groups (category, subcategory, set, question) right on all their figures. fAcc: figures
    (category, subcategory, set, figure) right on all their questions, where VS figure 0, which is no figure, is left
    out. A group with a missing answer is left out of qAcc or fAcc and named.

    Args:
        questions: `HallusionBench.json` of the authors.
        visual: `all`, or `pictures`: only questions that come with one.
        parser: one of `PARSERS`.
        suffix: appended to every question.
    """

    questions: str | Path
    visual: Literal["all", "pictures"] = "all"
    parser: str = "words"
    suffix: str = "\nPlease answer yes or no."

    max_new_tokens = 32

    def __post_init__(self) -> None:
        for value, known in ((self.visual, ("all", "pictures")), (self.parser, PARSERS)):
            if value not in known:
                raise UsageError(f"unknown name {value!r} for HallusionBench{nearest(value, known)}")

    @property
    def label(self) -> str:
        """Name with the variant."""
        return f"hallusion[{self.visual},{self.parser}]"

    def items(self) -> list[Item]:
        """The questions; those about no figure have an empty picture name.

        Raises:
            UsageError: for a row without one of the fields.
        """
        items = []
        for number, row in enumerate(read_objects(self.questions, Problems()), 1):
            missing = [key for key in _KEYS if key not in row]
            if missing or str(row["gt_answer"]) not in ("0", "1"):
                raise UsageError(f"{self.questions}: row {number} needs {', '.join(missing) or 'gt_answer 0 or 1'}")
            image = (
                "" if str(row.get("visual_input", "1")) == "0" else str(row.get("filename") or "").removeprefix("./")
            )
            if self.visual == "pictures" and not image:
                continue
            kind, sub, group, figure, asked = (str(row[key]) for key in _KEYS[:5])
            question = str(row["question"])
            truth = {
                "label": "yes" if str(row["gt_answer"]) == "1" else "no",
                "category": kind,
                "set": f"{kind}/{sub}/{group}",
                "figure": None if (kind, figure) == ("VS", "0") else f"{kind}/{sub}/{group}/figure {figure}",
                "group": f"{kind}/{sub}/{group}/question {asked}",
                "question": question,
            }
            items.append(Item(f"{kind}/{sub}/{group}/{figure}/{asked}", image, question + self.suffix, truth))
        return items

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Questions with their answers, found by id, or by picture and question."""
        items = self.items()
        return match(items, records, problems, by_question(items))

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """aAcc, qAcc, fAcc, and aAcc of the visual dependent and the visual supplement questions.

        The cluster of an item is its set, since groups span the pictures of a set.
        """
        problems = problems or Problems()
        replies, parse = self.replies(records, problems), PARSERS[self.parser]
        said = [parse(reply.text) for reply in replies]
        right = [verdict == reply.item.truth["label"] for verdict, reply in zip(said, replies, strict=True)]
        rows: list[dict[str, float]] = []
        for reply, verdict, good in zip(replies, said, right, strict=True):
            if verdict not in ("yes", "no"):
                problems.add("answers that are neither yes nor no, wrong", reply.item.id)
            kind = reply.item.truth["category"]
            row = {"items": 1.0, "right": float(good), "unparsed": float(verdict not in ("yes", "no"))}
            row |= {"empty": float(not reply.text.strip()), "yes": float(verdict == "yes")}
            row |= {f"{name}/{column}": 0.0 for name in ("VD", "VS") for column in ("items", "right")}
            rows.append(row | {f"{kind}/items": 1.0, f"{kind}/right": float(good)})
        items = self.items()
        for column, key in (("groups", "group"), ("figures", "figure")):
            _whole(items, replies, right, rows, key, column, problems)
        details = {
            reply.item.id: {"label": reply.item.truth["label"], "parsed": verdict}
            for reply, verdict in zip(replies, said, strict=True)
        }
        return table(replies, rows, METRICS, problems, details, [reply.item.truth["set"] for reply in replies])


METRICS: Mapping[str, Metric] = {
    "aacc": ratio("right", "items"),
    "qacc": ratio("groups/right", "groups"),
    "facc": ratio("figures/right", "figures"),
    "aacc_vd": ratio("VD/right", "VD/items"),
    "aacc_vs": ratio("VS/right", "VS/items"),
    "yes_ratio": ratio("yes", "items"),
    "unparsed": ratio("unparsed", "items"),
    "empty": ratio("empty", "items"),
}


def _whole(
    items: Iterable[Item],
    replies: Iterable[Reply],
    right: Iterable[bool],
    rows: Iterable[dict[str, float]],
    key: str,
    column: str,
    problems: Problems,
) -> None:
    """Adds a group's columns to the row of its last answer; 1 right if all its answers are."""
    sizes: dict[Any, int] = {}
    for item in items:
        sizes[item.truth[key]] = sizes.get(item.truth[key], 0) + 1
    seen: dict[Any, list[bool]] = {}
    for reply, good, row in zip(replies, right, rows, strict=True):
        name = reply.item.truth[key]
        group = seen.setdefault(name, [])
        group.append(good)
        done = name is not None and len(group) == sizes[name]
        row |= {column: float(done), f"{column}/right": float(done and all(group))}
    for name, group in seen.items():
        if name is not None and len(group) < sizes[name]:
            problems.add(f"{column} with a missing answer, not scored", name)
