"""What is said about a scene: captions in several styles, and questions whose answers follow from the annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlmfix.errors import UsageError, nearest

from .scene import Object, Scene
from .world import KINDS, NAMES

T = TypeVar("T")

PLURALS = {
    "person": "people",
    "bus": "buses",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "wine glass": "wine glasses",
    "knife": "knives",
    "sandwich": "sandwiches",
    "broccoli": "pieces of broccoli",
    "couch": "couches",
    "mouse": "mice",
    "scissors": "pairs of scissors",
    "toothbrush": "toothbrushes",
}
SINGULARS = {"skis": "pair of skis", "scissors": "pair of scissors", "broccoli": "piece of broccoli"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

PROMPTS = {
    "long": (
        "Describe the image.",
        "Describe this image.",
        "Please describe this image in detail.",
        "Please describe the image in detail.",
        "Describe this image in detail.",
        "Describe the image in detail.",
        "Please help me describe the image in detail.",
        "What is shown in this picture?",
    ),
    "short": (
        "Describe the image briefly.",
        "Describe the image in one sentence.",
        "Write a short caption for this image.",
        "Provide a one-sentence caption for the provided image.",
        "Give a brief description of the image.",
    ),
    "list": (
        "What is in the image?",
        "List the objects in the image.",
        "Which objects can you see in this picture?",
        "What objects are in the image?",
    ),
}
"""Style of caption -> the prompts that ask for it."""

BRIEFLY = (
    "Please answer yes or no.",
    "Answer with yes or no.",
    "Please answer this question with one word.",
    "Answer the question using a single word or phrase.",
)
"""What asks for `Yes` or `No` alone, as the benchmarks word it."""

QUESTIONS = ("existence", "count", "size", "position", "relation", "scene")
"""Kinds of question."""


@dataclass(frozen=True)
class Turn:
    """One prompt and its right answer.

    Args:
        kind: a caption style of `PROMPTS` or one of `QUESTIONS`.
        prompt, answer: the text.
        about: the category asked for, empty for captions.
    """

    kind: str
    prompt: str
    answer: str
    about: str = ""


def article(name: str) -> str:
    """`a` or `an` with the name, as POPE asks."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def phrase(name: str, count: int, adjective: str = "") -> str:
    """`a fork`, `a large fork`, `two forks`."""
    if count > 1:
        return f"{NUMBERS[count]} {PLURALS.get(name, name + 's')}"
    return article(" ".join(filter(None, (adjective, SINGULARS.get(name, name)))))


def caption(scene: Scene, style: str, rng: np.random.Generator | None = None) -> Turn:
    """A caption of one style.

    Args:
        scene: what to describe; every object is named, the most salient roughly first.
        style: `long` (a sentence for every one or two objects, with size and place), `short` (one sentence) or `list`.
        rng: chooses the wording; by default seeded by the scene.

    Raises:
        UsageError: unknown style.
    """
    if style not in PROMPTS:
        raise UsageError(f"unknown caption style: {style!r}{nearest(style, PROMPTS)}")
    rng = _lots(scene, 1) if rng is None else rng
    prompt = _one(rng, PROMPTS[style])
    ranked = _ranked(scene, rng)
    if style == "long":
        return Turn(style, prompt, _long(scene, ranked, rng))
    listed = _join([phrase(item.name, count) for item, count in ranked])
    if style == "list":
        return Turn(style, prompt, _one(rng, ("There is {}.", "The objects are {}.")).format(listed))
    opening = _one(rng, ("{} with {}.", "A picture of {} with {}.", "This is {} with {}."))
    text = opening.format(article(scene.kind), listed)
    return Turn(style, prompt, text[0].upper() + text[1:])


def captions(scene: Scene) -> list[Turn]:
    """Five captions, as COCO has: two long, two short, one list."""
    rng = _lots(scene, 2)
    return [caption(scene, style, rng) for style in ("long", "short", "long", "short", "list")]


def question(scene: Scene, kind: str, rng: np.random.Generator | None = None) -> Turn:
    """A question of one kind, or of existence where the scene has nothing of that kind to ask about.

    Raises:
        UsageError: unknown kind.
    """
    if kind not in QUESTIONS:
        raise UsageError(f"unknown kind of question: {kind!r}{nearest(kind, QUESTIONS)}")
    rng = _lots(scene, 3) if rng is None else rng
    if kind == "scene":
        return Turn(kind, "What kind of place is this?", f"This is {article(scene.kind)}.")
    clear = _clear(scene)
    if kind == "count" and clear:
        return _count(scene, _one(rng, clear), rng)
    if kind == "relation" and len(clear) > 1:
        first, second = (clear[i] for i in rng.permutation(len(clear))[:2])
        if abs(first.x - second.x) > 12:
            return _relation(first, second, rng)
    if kind == "size":
        sized = [item for item in clear if item.largeness and scene.counts[item.name] == 1]
        if sized:
            return _size(_one(rng, sized), rng)
    if kind == "position":
        single = [item for item in clear if scene.counts[item.name] == 1]
        if single:
            item = _one(rng, single)
            return Turn(kind, f"Where is the {item.name}?", f"The {item.name} is {item.region}.", item.name)
    return _existence(scene, rng)


def questions(scene: Scene) -> list[Turn]:
    """One question of every kind, and three more of existence."""
    rng = _lots(scene, 4)
    return [question(scene, kind, rng) for kind in (*QUESTIONS, "existence", "existence", "existence")]


def _lots(scene: Scene, salt: int) -> np.random.Generator:
    return np.random.default_rng([*scene.key, salt])


def _one(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _ranked(scene: Scene, rng: np.random.Generator) -> list[tuple[Object, int]]:
    """Every category once, by its largest copy, in order of salience: size times opacity, shaken."""
    counts = scene.counts
    largest: dict[str, Object] = {}
    for item in sorted(scene.objects, key=lambda item: item.size):
        largest[item.name] = item
    shaken = {name: item.size * item.opacity * float(rng.lognormal(0, 0.25)) for name, item in largest.items()}
    return [(largest[name], counts[name]) for name in sorted(shaken, key=shaken.__getitem__, reverse=True)]


def _clear(scene: Scene) -> list[Object]:
    """The clearly drawn objects, one of each category."""
    return list({item.name: item for item in scene.objects if not item.hard}.values())


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _long(scene: Scene, ranked: list[tuple[Object, int]], rng: np.random.Generator) -> str:
    place = article(scene.kind)
    sentences = [
        _one(rng, (f"The image shows {place}.", f"This is a picture of {place}.", f"The picture shows {place}."))
    ]
    rest = list(ranked)
    while rest:
        item, count = rest.pop(0)
        what = phrase(item.name, count, item.largeness if rng.random() < 0.5 else "")
        where = "" if count > 1 else " " + item.region
        plural = count > 1
        form = int(rng.integers(4))
        if form == 0 and rest:
            other, others = rest.pop(0)
            sentences.append(f"There {'are' if plural else 'is'} {what} and {phrase(other.name, others)}.")
        elif form == 1:
            sentences.append(f"{what[0].upper()}{what[1:]} {'are' if plural else 'is'}{where or ' in the picture'}.")
        elif form == 2:
            sentences.append(f"{what[0].upper()}{what[1:]} can be seen{where}.")
        else:
            sentences.append(f"There {'are' if plural else 'is'} {what}{where}.")
    return " ".join(sentences)


def _existence(scene: Scene, rng: np.random.Generator) -> Turn:
    present = list(scene.counts)
    yes = bool(rng.random() < 0.5)
    likely = [name for name in KINDS[scene.kind].frequent if name not in present]
    if yes:
        name = _one(rng, present)
    elif likely and rng.random() < scene.world.likely_negatives:
        name = _one(rng, likely)
    else:
        name = _one(rng, [name for name in NAMES if name not in present])
    short = bool(rng.random() < 0.5)
    thing = article(name)
    asked = _one(
        rng,
        (
            f"Is there {thing} in the image?",
            f"Is there {thing} in this image?",
            f"Can you see {thing} in the image?",
            f"Does the image contain {thing}?",
        ),
    )
    if short:
        return Turn("existence", f"{asked} {_one(rng, BRIEFLY)}", "Yes" if yes else "No", name)
    return Turn(
        "existence",
        asked,
        f"Yes, there is {thing} in the image." if yes else f"No, there is no {name} in the image.",
        name,
    )


def _count(scene: Scene, item: Object, rng: np.random.Generator) -> Turn:
    count = scene.counts[item.name]
    plural = PLURALS.get(item.name, item.name + "s")
    if rng.random() < 0.5:
        verb = "are" if count > 1 else "is"
        return Turn("count", f"How many {plural} are there in the image?", f"There {verb} {NUMBERS[count]}.", item.name)
    said = count if rng.random() < 0.5 else _one(rng, [n for n in (1, 2, 3) if n != count])
    asked = (
        f"Are there {phrase(item.name, said)}"
        if said > 1
        else f"Is there only one {SINGULARS.get(item.name, item.name)}"
    )
    answer = "Yes" if said == count else "No"
    return Turn("count", f"{asked} in this image? Please answer yes or no.", answer, item.name)


def _size(item: Object, rng: np.random.Generator) -> Turn:
    if rng.random() < 0.5:
        return Turn("size", f"Is the {item.name} large or small?", f"The {item.name} is {item.largeness}.", item.name)
    said = _one(rng, ("large", "small"))
    answer = "Yes" if said == item.largeness else "No"
    return Turn("size", f"Is the {item.name} {said} in this image? Please answer yes or no.", answer, item.name)


def _relation(first: Object, second: Object, rng: np.random.Generator) -> Turn:
    side = _one(rng, ("left", "right"))
    true = (first.x < second.x) == (side == "left")
    asked = f"Is the {first.name} on the {side} side of the {second.name}? Please answer yes or no."
    return Turn("relation", asked, "Yes" if true else "No", first.name)
