"""Scenes: a small drawn world with COCO categories and annotations, in which a model learns what belongs where.

Pictures are COCO-category objects (emoji sprites of one atlas) on textured grounds. Each kind of scene has five
frequent objects; the
training split follows them, the shifted splits break them. Pictures, annotations and text follow from (split, seed,
number) alone.

    >>> from vlmfix.eval import scenes
    >>> one = scenes.scene("test", seed=0, number=3)        # a Scene: kind, objects with place, size, opacity
    >>> scenes.captions(one)[0].answer                      # Turn(kind, prompt, answer)
    >>> scenes.questions(one)                               # existence, count, size, position, relation
    >>> scenes.build("folder", n=100, split="test", seed=0) # PNGs, instances.json, captions.json in COCO format
    >>> scenes.compose(scenes.pack([one]))                  # the same pictures as a batch of tensors, on any device

Splits: `train` and `typical` (same distribution, unseen), `tuning`, `test`, `demo` (shifted). Each draws from random
streams of its
own, so tuning and test share no picture whatever the seeds. pico was trained on `train`; figures are reported on
`test`, seed 0.
"""

from typing import TYPE_CHECKING, Any

from .files import build
from .scene import MAX_OBJECTS, Object, Scene, scene, scenes
from .text import PROMPTS, QUESTIONS, Turn, caption, captions, question, questions
from .world import CATEGORIES, IMAGE_SIZE, KINDS, NAMES, SPLITS, WORLD, Kind, World

if TYPE_CHECKING:
    from .render import Packed, atlas, compose, pack

__all__ = [
    "CATEGORIES",
    "IMAGE_SIZE",
    "KINDS",
    "MAX_OBJECTS",
    "NAMES",
    "PROMPTS",
    "QUESTIONS",
    "SPLITS",
    "WORLD",
    "Kind",
    "Object",
    "Packed",
    "Scene",
    "Turn",
    "World",
    "atlas",
    "build",
    "caption",
    "captions",
    "compose",
    "pack",
    "question",
    "questions",
    "scene",
    "scenes",
]


def __getattr__(name: str) -> Any:
    """Import the parts that need torch when they are first asked for."""
    if name in ("Packed", "atlas", "compose", "pack"):
        from . import render

        return getattr(render, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
