"""A model that answers at once and remembers what it was asked, in place of the real one behind the commands."""

import os
import sys
import time
from typing import ClassVar

import vlmfix.api
from vlmfix.api import Answer
from vlmfix.commands import main
from vlmfix.errors import Refusal
from vlmfix.recipe import Recipe


class FakeVLM:
    """Says what it sees; fails on prompts that hold "explode"; `m3id` is refused."""

    model = processor = None
    calls: ClassVar[list[dict]] = []
    engine: ClassVar[dict] = {"engine": "auto", "compile": False}

    def __init__(self, recipe="greedy"):
        self.recipe = Recipe.of(recipe)
        self.report = {"visual_tokens": [1], "methods": {"var": {"layers": [1, 2, 3, 7]}}}
        if "m3id" in str(self.recipe):
            raise Refusal("m3id cannot act here: give another method")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        pass

    def answer(self, images, prompts, *, max_new_tokens=256, seed=None, ids=None, details=False, **generation):
        if any("explode" in prompt for prompt in prompts):
            raise RuntimeError("boom")
        self.calls.append({"ids": ids, "images": images, "seed": seed, "max": max_new_tokens, **generation})
        if "FAKE_LOG" in os.environ:
            with open(os.environ["FAKE_LOG"], "a") as log:
                log.write("".join(f"{key}\n" for key in ids or prompts))
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        answers = [
            Answer(f"{self.recipe} sees {_see(image)}", 5, 0.1, dict(self.report))
            for image, _ in zip(images, prompts, strict=True)
        ]
        return answers if details else [answer.text for answer in answers]


def _see(image):
    if image is None:
        return "nothing"
    images = image if isinstance(image, list) else [image]
    return " and ".join(f"{each.width}x{each.height}" for each in images)


def load(model="pico", recipe="greedy", **options):
    FakeVLM.calls.append({"model": model, **options})
    return FakeVLM(recipe)


def wrap(model, processor, recipe, **how):
    assert how == FakeVLM.engine
    return FakeVLM(recipe)


if __name__ == "__main__":
    vlmfix.api.load, vlmfix.api.wrap = load, wrap
    main(sys.argv[1:])
