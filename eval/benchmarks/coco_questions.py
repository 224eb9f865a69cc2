"""Yes/no questions that follow from annotations: existence, number and side, each as a pair of one yes and one no."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from .chair_words import plurals
from .coco import Picture, Thing, neighbours

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

Pair = tuple[str, str]
"""A question with answer yes and one with answer no."""

_IRREGULAR = {"person": "people", "mouse": "mice", "sheep": "sheep"}
_UNCOUNTED = frozenset(("skis", "scissors", "broccoli"))
_APART = 1 / 8


def rivals(pictures: Sequence[Picture]) -> dict[int, list[str]]:
    """Picture id -> absent objects, those that share most pictures with the present ones first."""
    together = neighbours(picture.objects for picture in pictures)
    rank = {name: {other: place for place, other in enumerate(near)} for name, near in together.items()}
    found = {}
    for picture in pictures:
        present = picture.objects
        absent = [name for name in together if name not in present]
        places = {name: min((rank[here].get(name, len(rank)) for here in present), default=0) for name in absent}
        found[picture.id] = sorted(absent, key=places.__getitem__)
    return found


def existence(picture: Picture, absent: Sequence[str], rng: random.Random) -> Pair | None:
    """Is there a dog in this image? Asked of a clear object and of the likeliest absent one."""
    present = list(dict.fromkeys(thing.name for thing in _clear(picture)))
    return (exists(rng.choice(present)), exists(absent[0])) if present and absent else None


def exists(name: str) -> str:
    """The existence question about an object."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in this image?"


def number(picture: Picture, rng: random.Random) -> Pair | None:
    """Are there two dogs in this image? Asked with the right number and with one more or less."""
    copies = Counter(thing.name for thing in picture.things)
    clear = Counter(thing.name for thing in _clear(picture))
    known = [n for n, k in copies.items() if k == clear[n] and k < len(NUMBERS) - 1 and n not in _UNCOUNTED]
    if not known:
        return None
    name = rng.choice(known)
    right = copies[name]
    wrong = right + 1 if right == 1 else right + rng.choice((-1, 1))
    return _counted(name, right), _counted(name, wrong)


def side(picture: Picture, rng: random.Random) -> Pair | None:
    """Is the dog on the left side of the cat? Asked of two single objects well apart."""
    copies = Counter(thing.name for thing in picture.things)
    single = [thing for thing in _clear(picture) if copies[thing.name] == 1 and len(thing.box) == 4]
    apart = _APART * picture.width
    pairs = [(a, b) for a in single for b in single if a.name != b.name and abs(_middle(a) - _middle(b)) > apart]
    if not pairs or not apart:
        return None
    first, second = rng.choice(pairs)
    sides = ("left", "right") if _middle(first) < _middle(second) else ("right", "left")
    yes, no = (f"Is the {first.name} on the {where} side of the {second.name}?" for where in sides)
    return yes, no


def pairs(picture: Picture, absent: Sequence[str], rng: random.Random) -> Mapping[str, Pair]:
    """All pairs that a picture allows, by kind."""
    made = {"existence": existence(picture, absent, rng), "number": number(picture, rng), "side": side(picture, rng)}
    return {kind: pair for kind, pair in made.items() if pair is not None}


def _clear(picture: Picture) -> list[Thing]:
    """Objects that are neither a crowd nor marked as hard to see."""
    return [thing for thing in picture.things if not thing.extras.get("iscrowd") and not thing.extras.get("hard")]


def _middle(thing: Thing) -> float:
    return thing.box[0] + thing.box[2] / 2


def _counted(name: str, count: int) -> str:
    if count == 1:
        return f"Is there only one {name} in this image?"
    return f"Are there {NUMBERS[count]} {_IRREGULAR.get(name) or plurals(name)[-1]} in this image?"
