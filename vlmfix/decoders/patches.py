"""Patches: overlapping crops answer as well, and what too few of them agree on is taken out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmfix.decoders.words import STOP
from vlmfix.method import AnswerMethod, Asker, Method, ModelFacts, Settled, check_range

PLACES = {
    "upper left": (0.0, 0.0),
    "upper right": (1.0, 0.0),
    "lower left": (0.0, 1.0),
    "lower right": (1.0, 1.0),
    "centre": (0.5, 0.5),
}
"""Place of a crop -> how far right and down it lies, as shares of the way."""

_FRAME = """
left right top bottom upper lower middle center centre side edge corner front behind foreground background
large big small little tiny huge one two three four five six seven eight nine ten several many
image picture photo photograph scene view show showing shown depict depicting feature see seen visible appear
"""
FRAME = frozenset(_FRAME.split())
"""Words about place, size and number, which change with the crop, and about pictures as such."""

IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "buses": "bus"}

SHORT = "it is a short answer, and crops are compared for descriptions alone"
APART = "the crops name nothing of what it says"


@dataclass(frozen=True)
class Patches(AnswerMethod):
    """The answers of overlapping crops merged by agreement, a reading of the abstract.

    "Patch Matters: Training-free Fine-grained Image Caption Enhancement via Local Perception", arXiv 2504.06666: a
    picture is divided into patches, each is described, and the descriptions are put together with that of the whole,
    contradictions filtered out. The published pipeline has a detector that finds semantic patches, a model that
    matches sentences with pictures, and a language model that writes the final text. Here is none of them; all that
    follows is our choice. Four corners and the centre, enlarged to the size of the picture, are asked the same under
    the same recipe. A word is agreed on where enough views name it, the whole picture being one of them. Sentences of
    the whole picture's answer stay where enough of their words are agreed on; what every crop names and those sentences
    do not is added in a crop's own sentence, with its place. So every sentence is one that the model wrote, and the
    report lists those dropped and added. Words about place, size and number are not compared. Of several pictures in
    one prompt each is cut in the same way. For English; answers of one sentence, and answers that begin with yes or no,
    stay as they are at no further cost.

    Args:
        size: sides of a crop as shares of the picture's.
        centre: whether the centre is a crop besides the corners.
        agree: how many views must name a word, the whole picture counted.
        share: share of a sentence's words that must be agreed on; 0 keeps all sentences.
        add: share of the crops that must name every word of a sentence that is added; None to add nothing.
        instruction: what crops are asked; empty for the question itself.
    """

    size: float = 0.8
    centre: bool = True
    agree: int = 3
    share: float = 0.5
    add: float | None = 1.0
    instruction: str = ""

    def neutral(self) -> bool:
        """Nothing is dropped and nothing added."""
        return (self.agree == 1 or self.share == 0) and self.add is None

    def resolve(self, facts: ModelFacts) -> Method:
        """Checks the ranges."""
        check_range(self, "size", 0, 1, open_low=True)
        check_range(self, "agree", 1, len(self.places) + 1)
        check_range(self, "share", 0, 1)
        if self.add is not None:
            check_range(self, "add", 0, 1, open_low=True)
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """Where the crops are."""
        return tuple(place for place in PLACES if self.centre or place != "centre")

    def settle(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Any]], questions: Sequence[str], ask: Asker
    ) -> list[Settled]:
        """Descriptions merged with those of the crops, one pass for each place; short answers as they are."""
        long = [i for i, text in enumerate(texts) if describes(text)]
        asked = [self.instruction or questions[i] for i in long]
        crops: dict[str, list[str]] = {}
        for place in self.places if long else ():
            cuts = [[cut(picture, place, self.size) for picture in pictures[i]] for i in long]
            crops[place] = ask(long, cuts, asked, place)
        out = [Settled(text, {"inactive": SHORT}) for text in texts]
        for at, i in enumerate(long):
            views = {place: found[at] for place, found in crops.items()}
            out[i] = self._settled(texts[i], views)
        return out

    def _settled(self, whole: str, crops: Mapping[str, str]) -> Settled:
        kept, dropped, added = merge(whole, crops, self.agree, self.share, self.add)
        notes: dict[str, Any] = {"crops": len(crops)}
        text = "".join(kept).strip()
        if not words(text):
            return Settled(whole, {**notes, "inactive": APART})
        behind = [f"In the {place}: {sentence}" for place, sentence in added]
        if behind:
            text += (" " if text.endswith((".", "!", "?")) else "\n") + " ".join(behind)
        return Settled(text, {**notes, "dropped": [sentence.strip() for sentence in dropped], "added": behind})


def merge(
    whole: str, crops: Mapping[str, str], agree: int, share: float, add: float | None
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """What views agree on.

    Args:
        whole: answer about the whole picture.
        crops: place -> answer about the crop.
        agree: views that must name a word, the whole picture counted.
        share: share of a sentence's words that must be agreed on.
        add: share of the crops that must name every word of an added sentence; None to add nothing.

    Returns:
        Sentences of `whole` that stay and that go, with the blanks behind them; and added sentences with their places.
    """
    named = {place: words(text) for place, text in crops.items()}
    kept: list[str] = []
    dropped: list[str] = []
    for sentence in sentences(whole):
        own = words(sentence)
        agreed = sum(1 + _views(word, named) >= agree for word in own)
        (kept if agreed >= share * len(own) else dropped).append(sentence)
    known = words("".join(kept))
    added: list[tuple[str, str]] = []
    for place, text in crops.items() if add is not None else ():
        for sentence in sentences(text):
            own = words(sentence)
            if own - known and all(_views(word, named) >= (add or 0) * len(crops) for word in own):
                added.append((place, sentence.strip()))
                known |= own
    return kept, dropped, added


def _views(word: str, named: Mapping[str, set[str]]) -> int:
    return sum(word in found for found in named.values())


def describes(text: str) -> bool:
    """Whether an answer is a description: of two sentences at least, and no yes or no."""
    return len(sentences(text)) > 1 and re.match(r"\W*(yes|no)\b", text, re.IGNORECASE) is None


def sentences(text: str) -> list[str]:
    """Sentences and lines of a text with the blanks behind them; put together, they are the text without its lead."""
    return re.findall(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s)|(?=\n)|\Z)\s*", text, re.DOTALL)


def words(text: str) -> set[str]:
    """What a text names: its words in the singular, but for words that say nothing about a picture, and `FRAME`."""
    return {singular(word) for word in re.findall(r"[^\W_]+", text.lower()) if word not in STOP} - FRAME


def singular(word: str) -> str:
    """An English word without the ending of a plural or of a verb's third person."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(ss|sh|ch|x|z)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def cut(picture: Image.Image, place: str, size: float) -> Image.Image:
    """The crop at a place, enlarged to the size of the picture."""
    across, down = PLACES[place]
    width, height = (max(1, round(side * size)) for side in picture.size)
    left, top = round((picture.width - width) * across), round((picture.height - height) * down)
    part = picture.crop((left, top, left + width, top + height))
    return part.resize(picture.size, Image.Resampling.LANCZOS)
