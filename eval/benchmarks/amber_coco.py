"""Items of AMBER's kinds about pictures in COCO's format."""

from __future__ import annotations

import random
from pathlib import Path

from ..base import Item
from .coco import read_coco
from .coco_questions import exists, pairs, rivals

LIKELY = 5
"""Plausible absent objects of a description, as AMBER has them."""

ABSENT = 3
"""Existence questions a picture; as in AMBER, all of them have the answer no."""


def items_from_coco(source: str | Path, pictures: int, seed: int) -> list[Item]:
    """Descriptions, existence, number (attribute) and left or right (relation) questions.

    The absent objects are those that share most pictures with the present ones.

    Args:
        source: folder or instances file.
        pictures: number of pictures drawn; all if there are fewer.
        seed: of the draws.
    """
    coco, rng = read_coco(source), random.Random(seed)
    absent = rivals(coco.pictures)
    chosen = rng.sample(coco.pictures, min(pictures, len(coco.pictures)))
    described, asked = [], []
    for picture in chosen:
        name = Path(picture.file).stem
        truth = {
            "kind": "generative",
            "truth": [[thing] for thing in picture.objects],
            "hallu": [[thing] for thing in absent[picture.id][:LIKELY]],
        }
        described.append(Item(f"{name}/description", picture.file, "Describe this image.", truth))
        questions = [("existence", "no", exists(thing)) for thing in absent[picture.id][:ABSENT]]
        made = pairs(picture, absent[picture.id], rng)
        for kind, group in (("number", "number"), ("side", "relation")):
            if kind in made:
                yes, no = made[kind]
                questions += [(group, "yes", yes), (group, "no", no)]
        for number, (group, label, question) in enumerate(questions, 1):
            truth = {"kind": group, "label": label, "question": question}
            asked.append(Item(f"{name}/{group}/{number}", picture.file, question, truth))
    return described + asked
