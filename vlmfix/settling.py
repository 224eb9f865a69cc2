"""Answers, and how a method settles them that lets the otherwise same recipe answer further questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlmfix import registry
from vlmfix.attention.observing import OBSERVERS
from vlmfix.attention.request import NO_PICTURE
from vlmfix.errors import Refusal
from vlmfix.hf.hooks import warn_once
from vlmfix.method import AnswerMethod


@dataclass(frozen=True)
class Answer:
    """One answer with what it took.

    Args:
        text: the answer.
        tokens: generated tokens of all passes it took, end tokens included.
        seconds: time of its batches, each divided by the batch's size.
        report: what acted where; see `FixedVLM.report`.
        evidence: measures of this answer by name: visual_tokens, prefill_seconds (its share of the batch's), and
            margin, by how much the first token's scores prefer yes to no.
    """

    text: str
    tokens: int
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


Answering = Callable[[Sequence[Any], Sequence[str], Sequence[str]], list[Answer]]
"""(pictures, questions, names) -> answers of the recipe without its last method."""


def refuse_streams(method: AnswerMethod | None, generation: Mapping[str, Any]) -> None:
    """Refuses a streamer, which would show answers that are not final."""
    if method is not None and generation.get("streamer") is not None:
        raise Refusal(
            f"{registry.name_of(method)} settles answers once they are whole, and nothing can be streamed: leave it out"
        )


def settle(
    method: AnswerMethod,
    answers: Sequence[Answer],
    pictures: Sequence[Sequence[Any]],
    questions: Sequence[str],
    names: Sequence[str],
    answering: Answering,
) -> list[Answer]:
    """Final answers; tokens and seconds are those of all passes, the report of each says what became of it.

    Recorders see the answers about whole pictures alone.

    Args:
        method: what settles them.
        answers: of the rest of the recipe.
        pictures: per item its pictures, opened; none for an item without.
        questions: per item its question.
        names: per item its name, for seeded draws.
        answering: the rest of the recipe.
    """
    name, final = registry.name_of(method), list(answers)
    seen = [i for i, row in enumerate(pictures) if row]
    texts, shown, asked = [answers[i].text for i in seen], [pictures[i] for i in seen], [questions[i] for i in seen]

    def ask(items: Sequence[int], pictures: Sequence[Sequence[Any]], questions: Sequence[str], view: str) -> list[str]:
        rows, unwatched = [seen[i] for i in items], OBSERVERS.set(())
        try:
            made = answering([list(row) for row in pictures], questions, [f"{names[i]}|{view}" for i in rows])
        finally:
            OBSERVERS.reset(unwatched)
        for i, one in zip(rows, made, strict=True):
            final[i] = replace(final[i], tokens=final[i].tokens + one.tokens, seconds=final[i].seconds + one.seconds)
        return [one.text for one in made]

    settled = method.settle(texts, shown, asked, ask) if seen else []
    for i, one in zip(seen, settled, strict=True):
        final[i] = replace(final[i], text=one.text, report=_with(final[i].report, name, one.notes))
    for i in set(range(len(final))) - set(seen):
        final[i] = replace(final[i], report=_with(final[i].report, name, {"inactive": NO_PICTURE}))
    for reason in {one.notes["inactive"] for one in settled if "inactive" in one.notes}:
        warn_once(f"{name} leaves answers as they are: {reason}")
    return final


def summary(method: AnswerMethod, answers: Sequence[Answer], report: Mapping[str, Any]) -> dict[str, Any]:
    """A report on all answers: how many were settled, how much was done to them, why others were left alone."""
    name = registry.name_of(method)
    notes = [answer.report["methods"][name] for answer in answers]
    total: dict[str, Any] = {"rows": sum(note["rows"] for note in notes)}
    for key in sorted({key for note in notes for key, value in note.items() if isinstance(value, list)}):
        total[key] = sum(len(note.get(key, ())) for note in notes)
    if idle := Counter(note["inactive"] for note in notes if "inactive" in note):
        total["left_alone"] = dict(idle)
        total |= {} if total["rows"] else {"inactive": "; ".join(idle)}
    return {**report, "methods": {**report.get("methods", {}), name: total}}


def _with(report: Mapping[str, Any], name: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """One answer's own report."""
    rows = int("inactive" not in notes)
    return {**report, "methods": {**report.get("methods", {}), name: {"rows": rows, **notes}}}
