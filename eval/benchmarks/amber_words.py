"""Nouns of a description and how they meet the annotated words, as AMBER's scorer has it, without a tagger."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UsageError
from .chair_words import lexicon
from .files import shipped

Nouns = Callable[[str], list[str]]
"""Description -> its known nouns, repeats kept."""

Similarity = Callable[[str, str], float]
"""Two words -> at most 1."""

THRESHOLD = 0.8
"""A noun more similar than this to an annotated word counts as that word."""

_IRREGULAR = {
    "children": "child",
    "geese": "goose",
    "knives": "knife",
    "leaves": "leaf",
    "men": "men",
    "mice": "mouse",
    "scarves": "scarf",
    "shelves": "shelf",
    "snowmen": "snowman",
    "women": "woman",
}
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("ies", "y"),
)
_SINGULARS = frozenset(("vas", "sunglass", "chopstick", "earring", "slipper"))
_NOT_IN_WORDNET = frozenset(
    ("air-conditioning", "baconic", "bedsheet", "cann", "cathole", "chopsticks", "closestool", "cooktop", "doghole")
) | {"e-book", "earing", "earrings", "ebook", "electrombile", "kiwifruit", "paraglider", "pissoir", "rpoe", "sanitizer"}
_NOT_IN_WORDNET |= {"scoon", "seegull", "showerpuff", "slippers", "streetlamp", "waterfont", "TV", "hot"}

_VERBS_TOO = frozenset(("can", "watch", "leave", "support", "ring", "drink", "skate", "spray", "sailing", "range"))
_BEFORE_NOUN = frozenset(
    (
        "a",
        "an",
        "the",
        "his",
        "her",
        "their",
        "its",
        "this",
        "that",
        "of",
        "with",
        "and",
        "one",
        "two",
        "several",
        "some",
    )
)


def flags(
    nouns: Sequence[str],
    present: Sequence[Sequence[str]],
    absent: Sequence[Sequence[str]],
    safe: Sequence[str],
    similar: Similarity,
) -> tuple[list[int], list[int], list[str]]:
    """Which annotated words a description covers, and which of its nouns are hallucinated.

    A noun that is a present word or an associate of one covers it; else it sets the flag of the absent word that it is,
    or is similar to, and is hallucinated unless it is similar to a present word.

    Args:
        nouns: of the description.
        present: each annotated word with its associates behind it.
        absent: each plausible absent word with its associates behind it.
        safe: nouns that are never hallucinated.
        similar: of two words.

    Returns:
        A 0/1 flag per present word, one per absent word, and the hallucinated nouns.
    """
    here, there = _listed(present), _listed(absent)
    covered, imagined, wrong = [0] * len(present), [0] * len(absent), []
    for noun in nouns:
        if noun in safe:
            continue
        place = _place(noun, here)
        if place is not None:
            covered[place] = 1
            continue
        for found in (_place(noun, there), _close(noun, there, similar)):
            if found is not None:
                imagined[found] = 1
        place = _close(noun, here, similar)
        if place is not None:
            covered[place] = 1
        else:
            wrong.append(noun)
    return covered, imagined, wrong


def hallucinated(text: str, wrong: Sequence[str]) -> list[dict[str, Any]]:
    """Places of hallucinated nouns in a text, for marking."""
    spans = []
    for noun in dict.fromkeys(wrong):
        for found in re.finditer(rf"\b{re.escape(noun)}(?:e?s)?\b", text):
            spans.append({"start": found.start(), "end": found.end(), "word": noun, "hallucinated": True})
    return sorted(spans, key=lambda span: span["start"])


@functools.cache
def amber_nouns() -> Nouns:
    """Looks words up in AMBER's vocabulary, upper case kept, singulars as WordNet forms them.

    Stands in for the reference's part-of-speech tagger: words that are often verbs (`can`) count only after a
    determiner.
    """
    relation: Mapping[str, Sequence[str]] = shipped("amber")["relation"]
    known = {*relation, *(word for words in relation.values() for word in words)} - {"hot"}  # an adjective
    candidates = (known | _SINGULARS) - _NOT_IN_WORDNET  # so their plurals stay as they are, and are lost

    @functools.cache
    def lemma(word: str) -> str:
        if word in _IRREGULAR:
            return _IRREGULAR[word]
        forms = [word, *(word[: -len(end)] + new for end, new in _ENDINGS if word.endswith(end))]
        return min((form for form in forms if form in candidates), key=len, default=word)

    def nouns(text: str) -> list[str]:
        words = re.findall(r"[\w'-]+|[^\w\s]", text)
        found = []
        for before, word in zip(["", *words], words, strict=False):
            noun = lemma(word)
            if noun in known and (word not in _VERBS_TOO or before.lower() in _BEFORE_NOUN):
                found.append(noun)
        return found

    return nouns


def coco_nouns() -> Nouns:
    """Finds COCO categories as CHAIR does."""
    words = lexicon("corrected")
    return lambda text: [mention.object for mention in words.mentions(text)[0]]


NOUNS: Mapping[str, Callable[[], Nouns]] = {"amber": amber_nouns, "coco": coco_nouns}


def exact() -> Similarity:
    """1 for equal words, else 0."""
    return lambda one, other: float(one == other)


@functools.cache
def spacy_lg() -> Similarity:
    """Cosine of spaCy's en_core_web_lg vectors, as in the reference.

    Raises:
        UsageError: if spaCy or the vectors are not installed.
    """
    try:
        import spacy

        model = spacy.load("en_core_web_lg")
    except (ImportError, OSError) as error:
        raise UsageError(
            f"similarity spacy-lg needs spaCy and its vectors ({error}); pip install spacy && python -m spacy download "
            "en_core_web_lg, or choose similarity exact"
        ) from error
    vectors = functools.cache(model)
    return lambda one, other: float(vectors(one).similarity(vectors(other)))


SIMILARITIES: Mapping[str, Callable[[], Similarity]] = {"exact": exact, "spacy-lg": spacy_lg}


def _listed(words: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """Associates of every word, then the words, each with the word's place: the order in which the reference looks."""
    return [(other, place) for place, (_, *others) in enumerate(words) for other in others] + [
        (word, place) for place, (word, *_) in enumerate(words)
    ]


def _place(noun: str, listed: Sequence[tuple[str, int]]) -> int | None:
    return next((place for word, place in listed if word == noun), None)


def _close(noun: str, listed: Sequence[tuple[str, int]], similar: Similarity) -> int | None:
    return next((place for word, place in listed if similar(noun, word) > THRESHOLD), None)
