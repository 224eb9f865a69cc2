"""A user's own labelled yes/no questions as a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import UsageError
from ..rows import read_rows
from .base import Item, Score, ratio
from .benchmarks.answers import Reply, match, table
from .benchmarks.files import Problems
from .benchmarks.yesno import words
from .stats import interval


@dataclass(frozen=True)
class Questions:
    """Yes/no questions from a table (.csv, .tsv) or JSON lines with the columns image, question, answer, and maybe id.

    An answer says yes or no if the word stands in it and the other does not; anything else is wrong. Metrics: accuracy,
    `hallucination` (share of questions to be answered no that are answered yes), recall, f1, yes ratio, unparsed.

    Args:
        file: the table.
        suffix: appended to every question.
    """

    file: str | Path
    suffix: str = ""

    label = "own questions[words]"
    max_new_tokens = 10

    def items(self) -> list[Item]:
        """The questions.

        Raises:
            UsageError: naming the lines that lack something.
        """
        found, flaws = [], []
        for line, row in read_rows(Path(self.file), ["image", "question", "answer"]):
            if isinstance(row, str):
                flaws.append(f"line {line}: {row}")
                continue
            label = str(row.get("answer") or "").strip().lower()
            if not row.get("image") or not row.get("question") or label not in ("yes", "no"):
                flaws.append(f"line {line}: needs image, question and an answer yes or no")
                continue
            question = str(row["question"])
            truth = {"label": label, "question": question}
            found.append(Item(str(row.get("id") or line), str(row["image"]), question + self.suffix, truth))
        if flaws:
            raise UsageError(
                f"{self.file}: {'; '.join(flaws[:5])}" + (f" and {len(flaws) - 5} more" if flaws[5:] else "")
            )
        if not found:
            raise UsageError(f"{self.file} holds no question; write one a line under the header image,question,answer")
        return found

    def replies(self, records: Iterable[Mapping[str, Any]], problems: Problems) -> list[Reply]:
        """Questions with their answers, by id."""
        return match(self.items(), records, problems)

    def score(self, records: Iterable[Mapping[str, Any]], problems: Problems | None = None) -> Score:
        """Scores answers by the words yes and no in them."""
        problems = problems or Problems()
        replies = self.replies(records, problems)
        rows, details = [], {}
        for reply in replies:
            said, label = words(reply.text), reply.item.truth["label"]
            details[reply.item.id] = {"parsed": said, "label": label}
            rows.append(
                {
                    "items": 1.0,
                    "right": float(said == label),
                    "yes": float(said == "yes"),
                    "positive": float(label == "yes"),
                    "negative": float(label == "no"),
                    "true_yes": float(said == label == "yes"),
                    "false_yes": float(said == "yes" and label == "no"),
                    "unparsed": float(said in ("both", "neither")),
                }
            )
        metrics = {
            "accuracy": ratio("right", "items"),
            "hallucination": ratio("false_yes", "negative"),
            "recall": ratio("true_yes", "positive"),
            "f1": lambda sums: (
                200.0 * np.divide(sums["true_yes"], np.asarray(sums["yes"] + sums["positive"], np.float64))
            ),
            "yes_ratio": ratio("yes", "items"),
            "unparsed": ratio("unparsed", "items"),
        }
        return table(replies, rows, metrics, problems, details)


def too_few(score: Score, metric: str = "accuracy", wanted: float = 5.0, power: float = 0.8) -> str:
    """A sentence that says that so few items cannot show a difference of `wanted` points; empty if they can.

    From the spread of one run, as if two runs were independent; pairing usually needs fewer. Where all pictures agree,
    the spread counts as if two more, one of each kind, had been seen.

    Args:
        score: of the reference.
        metric: looked at.
        wanted: difference in points that matters to the user.
        power: with which it should be found.
    """
    found = interval(score, draws=2000)[metric]
    least = 100 * sqrt(found.clusters + 1) / (found.clusters + 2) / sqrt(found.clusters)
    detectable = (NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)) * sqrt(2) * max(found.sd, least)
    if detectable <= wanted:
        return ""
    needed = ceil(found.clusters * (detectable / wanted) ** 2) if detectable == detectable else None
    return (
        f"{len(score.ids)} items on {found.clusters} pictures are too few: the smallest detectable difference of "
        f"{metric} is about {detectable:.1f} points, {wanted:g} need about {needed or 'many more'} pictures"
    )
