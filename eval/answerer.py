"""The runner's view of a vlmfix model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from .. import registry
from ..checks import check_types
from ..errors import Refusal
from ..recipe import Recipe
from .base import Item
from .baselines import Arm
from .store import Record
from .world import alone, world

Placebo = Callable[[str, str, int], Any]
"""(recipe text, kind of placebo, seed) -> the recipe that does it."""

_RUN_ONLY = ("placebo", "placebo_seed")
_OF_THE_BATCH = ("visual_tokens", "pictures")
"""Lists over a batch's rows in a report; a record has its own row's number of visual tokens."""


class VlmAnswerer:
    """Answers with `vlm.answer`.

    Args:
        vlm: what `vlmfix.load` or `vlmfix.wrap` returned.
        name: what the user called the model; part of the run's hash.
    """

    def __init__(self, vlm: Any, name: str = "") -> None:
        self.vlm = vlm
        self._other: Callable[[str], Any] | None = None
        self.name = name or str(getattr(vlm.model.config, "_name_or_path", "") or type(vlm.model).__name__)

    def answer(self, items: Sequence[Item], images: Sequence[Any], settings: Mapping[str, Any]) -> list[Record]:
        """See `runner.Answerer`; `eos_bias` becomes a bias of the end tokens."""
        generation = {key: value for key, value in settings.items() if key not in _RUN_ONLY}
        if bias := generation.pop("eos_bias", 0.0):
            generation["sequence_bias"] = [[[token], float(bias)] for token in self._ends()]
        memory = _Memory(getattr(self.vlm.model, "device", None))
        prompts, ids = [item.prompt for item in items], [item.id for item in items]
        with self._others_of(items):
            answers = self.vlm.answer(list(images), prompts, ids=ids, details=True, **generation)
        peak = memory.peak()
        return [self._record(item, answer, peak) for item, answer in zip(items, answers, strict=True)]

    def show_others(self, other: Callable[[str], Any]) -> None:
        """Lets the branches of the placebo `other-picture` see other pictures.

        Args:
            other: picture name -> the picture (or file) shown instead.
        """
        self._other = other

    def _others_of(self, items: Sequence[Item]) -> AbstractContextManager[None]:
        if self._other is None:
            return nullcontext()
        from ..decoders.placebo import showing
        from ..pictures import load

        found = [self._other(item.image) for item in items]
        return showing([load(each) if isinstance(each, (str, Path)) else each for each in found])

    def close(self) -> None:
        """Restores the model."""
        self.vlm.close()

    def describe(self) -> dict[str, Any]:
        """Fields of `Spec` that the model decides, its evidence grade and family."""
        from ..hf.processors import render

        config, processor = self.vlm.model.config, self.vlm.processor
        quantised = getattr(config, "quantization_config", None)
        return {
            "model": self.name,
            "revision": getattr(config, "_commit_hash", None),
            "recipe": str(self.vlm.recipe),
            "recipe_json": self.vlm.recipe.to_json(),
            "processor": _jsonable(processor.to_dict()),
            "template": render(processor, "{prompt}", 1),
            "weights": {
                "dtype": str(self.vlm.model.dtype).removeprefix("torch."),
                "quantization": _jsonable(getattr(quantised, "to_dict", lambda: quantised)()),
            },
            "grade": self.vlm.recipe.evidence,
            "family": getattr(config, "model_type", ""),
        }

    def _record(self, item: Item, answer: Any, peak: int | None) -> Record:
        record: Record = {"id": item.id, "image": item.image, "prompt": item.prompt, "text": answer.text}
        record |= {"recipe": str(self.vlm.recipe), "tokens": answer.tokens, "seconds": answer.seconds}
        report = {key: value for key, value in answer.report.items() if key not in _OF_THE_BATCH}
        record |= {"extra_rows": answer.report.get("branches", 0), "report": report, **answer.evidence}
        return record | ({"peak_bytes": peak} if peak is not None else {})

    def _ends(self) -> list[int]:
        ends = self.vlm.model.generation_config.eos_token_id
        if ends is None:
            raise Refusal(f"{self.name} has no end token, so that an end bias cannot act")
        return list(ends) if isinstance(ends, (list, tuple)) else [ends]


class Opener:
    """Loads a model once and wraps it for each arm of a table.

    Args:
        model: Hub id, folder or `pico`.
        placebo: makes placebo recipes; those of `decoders.placebo` by default.
        recipes: recipe texts of all arms to come. A slip in one shows before anything is answered: names, settings and
            their types at once, what depends on the model as soon as it is loaded.
        load: further keywords of `vlmfix.load`.

    Raises:
        UsageError: a wrong name, key or value in a recipe.
    """

    def __init__(self, model: str, placebo: Placebo | None = None, recipes: Sequence[str] = (), **load: Any) -> None:
        self.model, self.placebo, self.load = model, placebo, load
        self.recipes = [Recipe.parse(text) for text in dict.fromkeys(recipes)]
        for method in (method for recipe in self.recipes for method in recipe.methods):
            check_types(registry.name_of(method), method)
        self._plain: Any = None

    def __call__(self, arm: Arm) -> VlmAnswerer:
        """The answerer of an arm; close it before the next one.

        Raises:
            Refusal: for a recipe that cannot act on the model, or a placebo that nothing can make.
            UsageError: a setting of one of the recipes does not fit the model.
        """
        from ..api import load

        if self._plain is None:
            options = dict(self.load)
            if not {"device", "device_map"} & set(options):
                options["device"] = world().device()
            with alone():
                self._plain = load(self.model, **options)
            for each in self.recipes:
                with contextlib.suppress(Refusal):  # that is told when the arm's turn comes
                    self._wrapped(each).close()
        recipe: Any = arm.recipe
        if kind := arm.settings.get("placebo"):
            recipe = self._placebo(arm.recipe, kind, arm.settings.get("placebo_seed", 0))
        answerer = VlmAnswerer(self._wrapped(recipe), self.model)
        if kind:
            _try(answerer)
        return answerer

    def _wrapped(self, recipe: Any) -> Any:
        from ..api import wrap

        how = {name: self.load[name] for name in ("engine", "compile") if name in self.load}
        return wrap(self._plain.model, self._plain.processor, recipe, **how)

    def _placebo(self, recipe: str, kind: str, seed: int) -> Any:
        if self.placebo is not None:
            return self.placebo(recipe, kind, seed)
        from ..presets import preset
        from .placebos import placebo_recipe

        return placebo_recipe(recipe, kind, seed, preset(str(getattr(self._plain.model.config, "_name_or_path", ""))))


def _try(answerer: VlmAnswerer) -> None:
    """Asks one question, so that a placebo that would change nothing is refused before the first item."""
    picture = Image.effect_noise((64, 64), 64).convert("RGB")
    answerer.show_others(lambda name: picture)
    try:
        answerer.answer([Item("try", "", "Is there a cat in the image?")], [picture], {"max_new_tokens": 1})
    except Exception:
        answerer.close()
        raise


class _Memory:
    """Highest memory over what is held at the start, on a GPU."""

    def __init__(self, device: Any) -> None:
        self.device = device if getattr(device, "type", "") == "cuda" else None
        if self.device is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int | None:
        if self.device is None:
            return None
        import torch

        return torch.cuda.max_memory_allocated(self.device) - self.start


def _jsonable(value: Any) -> Any:
    """JSON values of a configuration; anything else as its text."""
    return json.loads(json.dumps(value, default=str))
