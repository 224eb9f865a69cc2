"""Text quality without a judge: repetition, variety, length, and BLEU against other answers."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base import Item, Metric, Score, ratio
from .answers import Record, Reply, match, table
from .files import Problems

ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams."""


def tokens(text: str) -> list[str]:
    """Runs of letters, digits and apostrophes of the lower-cased text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def quality(text: str) -> dict[str, float]:
    """Columns of one answer; `METRICS` turns their sums into figures.

    distinct_n counts the different n-grams within the answer, rep_n is the share of n-grams that repeat an earlier
    one (0 for answers shorter than n), repeated_sentences the share of sentences that do.
    """
    found = tokens(text)
    columns: dict[str, float] = {"answers": 1, "tokens": len(found), "words": len(text.split(" ")) if text else 0}
    for n in ORDERS:
        grams = _grams(found, n)
        total, distinct = sum(grams.values()), len(grams)
        columns[f"grams_{n}"] = total
        columns[f"distinct_{n}"] = distinct
        columns[f"variety_{n}"] = distinct / total if total else 0.0
        columns[f"rep_{n}"] = (total - distinct) / total if total else 0.0
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.lower().strip()) if s]
    columns["repeated"] = (len(sentences) - len(set(sentences))) / len(sentences) if sentences else 0.0
    columns["empty"] = float(not text.strip())
    return columns


def _metrics() -> dict[str, Metric]:
    found: dict[str, Metric] = {f"rep_{n}": ratio(f"rep_{n}", "answers") for n in reversed(ORDERS)}
    found |= {f"distinct_{n}": ratio(f"distinct_{n}", f"grams_{n}") for n in ORDERS}
    found |= {f"distinct_{n}_macro": ratio(f"variety_{n}", "answers") for n in ORDERS}
    found["repeated_sentences"] = ratio("repeated", "answers")
    found["tokens"] = ratio("tokens", "answers", percent=False)
    found["words"] = ratio("words", "answers", percent=False)
    found["empty"] = ratio("empty", "answers")
    return found


METRICS: Mapping[str, Metric] = _metrics()
"""Figures of `quality`'s columns: shares in percent; lengths in tokens, and in words between single blanks."""


@dataclass(frozen=True)
class Text:
    """Text quality of any answers; BLEU-1 to BLEU-4 too where references are given.

    Args:
        references: answer files to compare with by id, item by item.
        max_new_tokens: token limit of the run; adds the share of answers whose record says that they reached it.
    """

    references: Sequence[str | Path] = ()
    max_new_tokens: int = 0

    label = "text"

    def items(self) -> list[Item]:
        """None: any answers can be scored."""
        return []

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """One item per id."""
        records = list(records)
        items: dict[str, Item] = {}
        for record in records:
            if "id" in record:
                name = str(record["id"])
                items.setdefault(name, Item(name, str(record.get("image", name)), str(record.get("prompt", ""))))
        return match(list(items.values()), records, problems)

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Repetition, variety and length of the answers, one item per id."""
        problems = problems or Problems()
        replies = self.replies(records, problems)
        bases = self._references(problems)
        if bases is not None:
            for reply in replies:
                if reply.item.id not in bases:
                    problems.add("answers without a reference, not scored", reply.item.id)
            replies = [reply for reply in replies if reply.item.id in bases]
        rows = []
        for reply in replies:
            row = quality(reply.text)
            row["limit"] = float(0 < self.max_new_tokens <= int(reply.record.get("tokens") or 0))
            if bases is not None:
                row |= bleu_counts(reply.text, bases[reply.item.id])
            rows.append(row)
        metrics = dict(METRICS)
        if self.max_new_tokens:
            metrics["cut"] = ratio("limit", "answers")
        if bases is not None:
            metrics |= {f"bleu_{n}": functools.partial(bleu, n=n) for n in ORDERS}
        return table(replies, rows, metrics, problems)

    def _references(self, problems: Problems) -> dict[str, list[str]] | None:
        if not self.references:
            return None
        from ..importers import read_answers

        paths = [self.references] if isinstance(self.references, (str, Path)) else self.references
        bases: dict[str, list[str]] = {}
        for path in paths:
            for record in read_answers(path, problems):
                if isinstance(record.get("text"), str):
                    bases.setdefault(str(record["id"]), []).append(record["text"])
        return bases


def bleu_counts(text: str, references: Sequence[str]) -> dict[str, float]:
    """Columns for `bleu`: clipped n-gram counts, n-grams, length, and that of the closest reference (ties: shorter)."""
    found, others = tokens(text), [tokens(reference) for reference in references]
    columns: dict[str, float] = {
        "length": len(found),
        "reference": min((abs(len(other) - len(found)), len(other)) for other in others)[1],
    }
    for n in ORDERS:
        grams, most = _grams(found, n), Counter[tuple[str, ...]]()
        for other in others:
            most |= _grams(other, n)
        columns[f"clipped_{n}"] = sum((grams & most).values())
        columns[f"guessed_{n}"] = max(0, len(found) - n + 1)
    return columns


def bleu(sums: Mapping[str, Any], n: int) -> Any:
    """BLEU-n of column sums, 0 to 1, with the constants of coco-caption.

    Not in percent, as captioning papers print it. Tokens are those of `tokens`, not the Penn Treebank's.
    """
    tiny, small = 1e-15, 1e-9
    product: Any = 1.0
    for k in range(1, n + 1):
        product = product * (sums[f"clipped_{k}"] + tiny) / (sums[f"guessed_{k}"] + small)
    lengths = (sums["length"] + tiny) / (sums["reference"] + small)
    return product ** (1 / n) * np.where(lengths < 1, np.exp(1 - 1 / lengths), 1.0)


def _grams(found: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(found[i:] for i in range(n)), strict=False))
