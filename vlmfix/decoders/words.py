"""Which words of a question carry content."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from vlmfix.errors import Refusal

_STOP = """
a about above after again against all also am an and any are as at be because been before being below between
both but by can cannot could did do does doing don down during each either else ever every few for from further
had has have having he her here hers herself him himself his how i if in into is it its itself just let may me
might more most must my myself neither no nor not of off on once only or other our ours ourselves out over own
per please same shall she should so some such than that the their theirs them themselves then there these they
this those through to too under until up upon us very was we were what when where whether which while who whom
whose why will with within without would yes you your yours yourself yourselves s t d ll m re ve
"""
STOP = frozenset(_STOP.split())
"""Words of English that say nothing about a picture by themselves."""

TAGS = frozenset({"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"})

Spans = list[tuple[int, int]]


def everything(text: str) -> Spans:
    """One span, the whole text."""
    return [(0, len(text))] if text.strip() else []


def outside_stop_words(text: str) -> Spans:
    """Words and numbers that are no stop words."""
    return [m.span() for m in re.finditer(r"\w+", text) if m.group().lower() not in STOP]


def by_spacy(text: str) -> Spans:
    """Nouns, names, verbs, adjectives, adverbs and numbers as spaCy's small English model tags them.

    Raises:
        Refusal: spaCy or its model is not installed.
    """
    return [(word.idx, word.idx + len(word)) for word in _spacy()(text) if word.pos_ in TAGS]


FILTERS: dict[str, Callable[[str], Spans]] = {
    "all": everything,
    "stop-words": outside_stop_words,
    "spacy": by_spacy,
}
"""Filters by name: text -> spans of its content words."""


def tokens_in(pieces: Sequence[str], spans: Spans) -> list[int]:
    """How many of the spans each token of a text touches.

    Args:
        pieces: what each token adds to the text.
        spans: from the text put together.
    """
    counts, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        blank = start + len(piece) - len(piece.lstrip())
        counts.append(sum(a < end and b > blank for a, b in spans) if end > start else 0)
        start = end
    return counts


@cache
def _spacy() -> Any:
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise Refusal(
            f"spaCy's English model is not at hand ({error}); install spacy and en_core_web_sm, or choose 'stop-words'"
        ) from error
