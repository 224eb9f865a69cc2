"""From a caption to the objects it mentions, by table: no tagger, no corpus, every mention with its place."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UsageError, nearest
from .files import shipped

SCORERS = ("standalone", "opera-like", "corrected")
"""Readings of words; see `Lexicon`."""

_BREAK = "\0"

_CUT = (
    r"""[;@#$%&?!"()\[\]{}<>`*\u201c\u201d\u2018\u2019\u2026\u2013\u2014]|-{2,}|\.{2,}|[,:](?!\d)"""
    r"""|'(?:s|m|d|ll|re|ve)?(?![\w'])|^'|n't\b|\.(?=["')\]}>\u201d\u2019\u00bb]*$)"""
)

_BEFORE_NOUN = frozenset(
    ("the", "a", "an", "his", "her", "their", "its", "of", "for", "in", "about", "to", "by", "this", "that", "and")
) | {"from", "with"}

_AFTER_GERUND = frozenset(
    ("area", "gear", "equipment", "options", "event", "trip", "location", "course", "arrangement", "arrangements")
) | {"competition", "competitions", "ground", "poles", "lift", "lifts", "activities", "adventure", "conditions"}


@dataclass(frozen=True)
class Mention:
    """One counted object of a text.

    Args:
        start, end: place in the text, end exclusive.
        word: the vocabulary's word.
        object: category it stands for.
    """

    start: int
    end: int
    word: str
    object: str


class Lexicon:
    """Words of the categories and how to find them (Object Hallucination in Image Captioning, arXiv 1809.02156).

    Scorers:
        standalone: the released table, with pattern's singulars (`bus` and `ties` are lost, `buses` and `tie` are not).
        opera-like: WordNet's noun, else verb (`seated` counts as a chair), as OPERA's code, which also tags parts of
            speech; here a gerund counts as a noun after an article or preposition and before words such as `area`.
        corrected: `standalone` with its slips mended: every word of the vocabulary and its regular plural counts,
            entries that can never match (leading blank, capital letters, three words) do, `cat/dog` is two words.

    Args:
        scorer: one of `SCORERS`.
        synonyms: further categories, or other words for known ones: category -> words; regular plurals are added.
    """

    def __init__(self, scorer: str = "standalone", synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        if scorer not in SCORERS:
            raise UsageError(f"unknown CHAIR scorer {scorer!r}{nearest(scorer, SCORERS)}")
        data = shipped("chair_words")
        self.scorer = scorer
        mended = scorer == "corrected"
        groups = {group[0]: group for group in data["groups"]} | {n: [n, *w] for n, w in (synonyms or {}).items()}
        self.objects: dict[str, str] = {}
        for name, words in groups.items():
            for word in words:
                self.objects[word.strip().lower() if mended or name in (synonyms or {}) else word] = name
        lemmas = data["lemmas"]
        self._nouns: dict[str, str] = dict(lemmas["noun" if scorer == "opera-like" else "standalone"])
        self._verbs: dict[str, str] = lemmas["verb"] if scorer == "opera-like" else {}
        self._compounds: dict[str, str] = dict(data["compounds"])
        custom = {word.strip().lower() for name in synonyms or {} for word in groups[name]}
        for word in list(self.objects) if mended else custom:
            self._add(word)
        self._longest = max(key.count(" ") + 1 for key in self._compounds) if mended or custom else 2
        self._cut = re.compile(_CUT + (r"|(?<=[^\W\d_])[/.](?=[^\W\d_])" if mended else ""))

    def mentions(self, text: str) -> tuple[list[Mention], int]:
        """Objects mentioned, repeats kept, and the number of tokens once double words are merged."""
        tokens = self._merged(self._lemmas(_lower(text)))
        words = {word for word, _, _ in tokens}
        skipped = "seat" if "toilet" in words else None
        found = [
            Mention(start, end, word, self.objects[word])
            for word, start, end in tokens
            if word in self.objects and word != skipped
        ]
        return found, len(tokens)

    def category(self, name: str) -> str:
        """The category of a category's name or synonym.

        Raises:
            UsageError: with the nearest known names.
        """
        word = name.strip().lower()
        found = self.objects.get(word) or self.objects.get(self._noun(word))
        if found is None:
            known = {*self.objects.values()}
            raise UsageError(f"unknown object {name!r}{nearest(name, known)}; or give its words as synonyms")
        return found

    def _add(self, word: str) -> None:
        *front, last = word.split()
        if front:
            self._compounds.setdefault(" ".join([*map(self._noun, front), self._noun(last)]), word)
            self._compounds.setdefault(word, word)
        for plural in plurals(last):
            self._nouns[plural] = last
        self._nouns.pop(last, None)

    def _noun(self, token: str) -> str:
        return self._nouns.get(token, token)

    def _lemmas(self, text: str) -> Iterable[tuple[str, int, int]]:
        tokens = self._tokens(text)
        for place, (token, start, end) in enumerate(tokens):
            word = self._noun(token)
            if word not in self.objects and self._verbs.get(token) in self.objects:
                before = tokens[place - 1][0] if place else ""
                after = tokens[place + 1][0] if place + 1 < len(tokens) else ""
                if not token.endswith("ing") or (before not in _BEFORE_NOUN and after not in _AFTER_GERUND):
                    word = self._verbs[token]
            yield word, start, end

    def _tokens(self, text: str) -> list[tuple[str, int, int]]:
        """Tokens with their places; a separator is a token too, so that double words do not reach across it."""
        found = []
        for piece in re.finditer(r"\S+", text):
            first, place, part = piece.start(), 0, piece.group()
            for cut in self._cut.finditer(part):
                if cut.start() > place:
                    found.append((part[place : cut.start()], first + place, first + cut.start()))
                found.append((_BREAK, first + cut.start(), first + cut.end()))
                place = cut.end()
            if place < len(part):
                found.append((part[place:], first + place, piece.end()))
        return found

    def _merged(self, lemmas: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        tokens, merged, place = list(lemmas), [], 0
        while place < len(tokens):
            for length in range(min(self._longest, len(tokens) - place), 1, -1):
                phrase = self._compounds.get(" ".join(word for word, _, _ in tokens[place : place + length]))
                if phrase is not None:
                    merged.append((phrase, tokens[place][1], tokens[place + length - 1][2]))
                    place += length
                    break
            else:
                merged.append(tokens[place])
                place += 1
        return merged


@functools.cache
def lexicon(scorer: str = "standalone") -> Lexicon:
    """The lexicon of the 80 COCO categories; shared."""
    return Lexicon(scorer)


def plurals(word: str) -> list[str]:
    """Regular plurals of an English noun."""
    if re.search(r"(?:s|x|z|ch|sh)$", word):
        return [word + "es"]
    if re.search(r"[^aeiou]y$", word):
        return [word[:-1] + "ies"]
    if re.search(r"(?:[^f]fe|[lra]f)$", word):
        return [word + "s", re.sub(r"fe?$", "ves", word)]
    return [word + "s", word + "es"] if word.endswith("o") else [word + "s"]


def _lower(text: str) -> str:
    """Lower case of the same length, so that places stay."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
