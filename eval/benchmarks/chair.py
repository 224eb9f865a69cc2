"""CHAIR: objects a caption mentions that are not in the picture (arXiv 1809.02156)."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import UsageError, nearest
from ..base import Item, Metric, Score, ratio
from . import text as text_quality
from .answers import Record, Reply, match, table
from .chair_truth import Truth, check_year, finder, read_truth
from .chair_words import SCORERS, Lexicon, Mention, lexicon
from .files import Problems, read_json, read_text

PROMPTS = {
    "opera": "Please describe this image in detail.",
    "pai": "Please help me describe the image in detail.",
    "pope1": "Generate a short caption of the image.",
    "pope2": "Provide a brief description of the given image.",
}
"""Prompts of published tables: OPERA; PAI and FIA; the two of the POPE paper. Other prompts, other figures."""

_TEXT = ("rep_4", "distinct_1", "repeated_sentences")


@dataclass(frozen=True)
class Span(Mention):
    """A mention and whether its object is missing from the picture.

    Args:
        hallucinated: not among the picture's objects.
    """

    hallucinated: bool = False


@dataclass(frozen=True)
class Chair:
    """CHAIR on pictures with COCO-format annotations.

    Figures: CHAIR_s, the share of captions with a hallucinated object; CHAIR_i, hallucinated mentions / mentions;
        recall,
    precision and F1 of distinct objects; lengths and repetition, without which CHAIR rewards collapse.

    Args:
        truth: folder with instances.json and captions.json, an instances file, or a compact file of `Truth.write`.
        captions: captions file for an instances file.
        scorer: one of `chair_words.SCORERS`.
        last_sentence: `keep` or `drop` a last sentence that the token limit cut off.
        prompt: text, or a name of `PROMPTS`.
        n: number of pictures drawn; all by default.
        seed: of that draw.
        ids: picture numbers to use instead, or a file with one a line.
        synonyms: further words: category -> words, or a JSON file of them.
        variant: of a compact file that holds overrides.
    """

    truth: str | Path
    captions: str | Path | None = None
    scorer: str = "standalone"
    last_sentence: Literal["keep", "drop"] = "keep"
    prompt: str = "opera"
    n: int | None = None
    seed: int = 0
    ids: Sequence[str | int] | str | Path | None = None
    synonyms: Mapping[str, Sequence[str]] | str | Path | None = None
    variant: str = "A"
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        for value, known in ((self.scorer, SCORERS), (self.last_sentence, ("keep", "drop"))):
            if value not in known:
                raise UsageError(f"unknown name {value!r} for CHAIR{nearest(value, known)}")

    @property
    def label(self) -> str:
        """Name with the variant, ground truth included."""
        dropped = ",complete sentences" if self.last_sentence == "drop" else ""
        return f"chair[{self.scorer},{self.ground_truth.source}{dropped}]"

    @property
    def ground_truth(self) -> Truth:
        """Objects of all pictures, read once."""
        return self._loaded[0]

    @functools.cached_property
    def _loaded(self) -> tuple[Truth, Lexicon]:
        given = self.synonyms
        words = given if given is None or isinstance(given, Mapping) else read_json(given)
        return read_truth(self.truth, self.captions, self.scorer, words, self.variant)

    def items(self) -> list[Item]:
        """One captioning request per picture.

        Raises:
            UsageError: for wanted ids without annotation, naming them.
        """
        truth = self.ground_truth
        prompt = PROMPTS.get(self.prompt, self.prompt)
        return [Item(key, truth.files[key], prompt, {"objects": list(truth.objects[key])}) for key in self._wanted()]

    def replies(self, records: Iterable[Record], problems: Problems) -> list[Reply]:
        """Pictures with their captions, found by picture number or file name."""
        records, items = list(records), self.items()
        if not self.ground_truth.captioned:
            problems.add("ground truth without captions: what people name but nobody annotated is an error", self.truth)
        find = finder(self.ground_truth)
        if self.n is None and self.ids is None:  # no set was asked for, so none of it can be missing
            named = {find(record) for record in records}
            items = [item for item in items if item.id in named] or items
        check_year(self.ground_truth, records, problems)
        return match(items, records, problems, find)

    def score(self, records: Iterable[Record], problems: Problems | None = None) -> Score:
        """Scores captions; character spans of all counted objects are in the details."""
        problems = problems or Problems()
        replies = self.replies(records, problems)
        rows, details = [], {}
        for reply in replies:
            columns, found = self._caption(reply, problems)
            rows.append(columns)
            details[reply.item.id] = {"spans": [vars(span) for span in found]}
        return table(replies, rows, METRICS, problems, details)

    def _caption(self, reply: Reply, problems: Problems) -> tuple[dict[str, float], list[Span]]:
        whole, cut = reply.text, complete(reply.text)
        text = cut if self.last_sentence == "drop" else whole
        if cut != whole:
            verb = "dropped" if self.last_sentence == "drop" else "kept"
            problems.add(f"captions whose last sentence is incomplete, {verb}", reply.item.id)
        truth, words = set(reply.item.truth["objects"]), self._loaded[1]
        mentions, tokens = words.mentions(text)
        found = [Span(m.start, m.end, m.word, m.object, m.object not in truth) for m in mentions]
        wrong, named = sum(span.hallucinated for span in found), {span.object for span in found}
        columns = {
            "captions": 1.0,
            "hallucinated_captions": float(wrong > 0),
            "mentions": float(len(found)),
            "hallucinated_mentions": float(wrong),
            "truth": float(len(truth)),
            "covered": float(len(truth & named)),
            "named": float(len(named)),
            "chair_tokens": float(tokens),
            "incomplete": float(cut != whole),
        }
        return columns | text_quality.quality(text), found

    def _wanted(self) -> list[str]:
        truth = self.ground_truth
        if self.ids is None:
            keys = list(truth.objects)
            if self.n is None or self.n >= len(keys):
                return keys
            return random.Random(self.seed).sample(sorted(keys, key=lambda key: (len(key), key)), self.n)
        listed = read_text(self.ids).split() if isinstance(self.ids, (str, Path)) else self.ids
        keys = [str(key) for key in listed]
        absent = [key for key in keys if key not in truth.objects]
        if absent:
            raise UsageError(
                f"{len(absent)} pictures are not in the annotations of {truth.year or 'unknown year'}: "
                f"{', '.join(absent[:5])}; give the annotation file of their split and year"
            )
        return keys


def _metrics() -> dict[str, Metric]:
    metrics: dict[str, Metric] = {
        "chair_s": ratio("hallucinated_captions", "captions"),
        "chair_i": ratio("hallucinated_mentions", "mentions"),
        "recall": ratio("covered", "truth"),
        "precision": ratio("covered", "named"),
        "f1": lambda sums: 200.0 * sums["covered"] / (sums["named"] + sums["truth"]),
        "length": ratio("words", "captions", percent=False),
        "tokens": ratio("chair_tokens", "captions", percent=False),
        "mentions": ratio("mentions", "captions", percent=False),
    }
    metrics |= {name: text_quality.METRICS[name] for name in _TEXT}
    return metrics | {"incomplete": ratio("incomplete", "captions"), "empty": ratio("empty", "captions")}


METRICS: Mapping[str, Metric] = _metrics()
"""Shares in percent; `length` in words between single blanks (POPE paper), `tokens` as OPERA counts them."""


def spans(text: str, objects: Iterable[str], scorer: str = "standalone", words: Lexicon | None = None) -> list[Span]:
    """Every object a text mentions, with its place, and whether it is missing from the picture.

    Args:
        text: caption or answer.
        objects: categories in the picture, or synonyms of them.
        scorer: one of `chair_words.SCORERS`.
        words: lexicon with words of your own, instead of `scorer`.

    Raises:
        UsageError: for an object that is no known category.
    """
    words = words or lexicon(scorer)
    truth = {words.category(name) for name in objects}
    return [Span(m.start, m.end, m.word, m.object, m.object not in truth) for m in words.mentions(text)[0]]


def complete(text: str) -> str:
    """The text without a last sentence that does not end; all of it if no sentence ends."""
    ends = list(re.finditer(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends and text[ends[-1].end() :].strip() else text
