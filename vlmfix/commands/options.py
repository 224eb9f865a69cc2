"""Options that several commands share, declared once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlmfix.errors import UsageError

if TYPE_CHECKING:
    from vlmfix.api import FixedVLM
    from vlmfix.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Methods = Annotated[str, typer.Option("--methods", help="Recipes, separated by ';'.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[str, typer.Option("--model", "-m", help="'pico' (bundled), a Hub id or a folder.")] = "pico"
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best one by default.")] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, bfloat16, float16; by default bfloat16 on a GPU, float32 elsewhere."),
    ] = None
    device_map: Annotated[str | None, typer.Option(help="Spread a large model over devices: auto, balanced.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint.")] = None
    quantize: Annotated[str | None, typer.Option(help="Load the weights quantised: 4bit or 8bit.")] = None
    processor: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of the processor; may be repeated.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False
    engine: Annotated[
        str, typer.Option(help="hf (transformers' loop), graph (a captured step, replayed), auto (graph on a GPU).")
    ] = "auto"
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the decoder before a step is captured: some 20 s, for little gain."),
    ] = False

    def load(self, recipe: Recipe | str = "greedy") -> FixedVLM:
        """Loads the model.

        Raises:
            VlmfixError: it cannot be loaded; the message says why and what to do.
        """
        settings = key_values(self.processor)
        from vlmfix.api import load

        return load(
            self.model,
            recipe,
            device=self.device,
            dtype=self.dtype,
            device_map=self.device_map,
            revision=self.revision,
            quantize=self.quantize,
            processor_kwargs=settings or None,
            trust_remote_code=self.trust_remote_code,
            engine=self.engine,
            compile=self.compile,
        )

    def spec(self) -> dict[str, Any]:
        """What decides the answers, for the key of a run: everything but the place of computation."""
        return {
            "model": self.model,
            "revision": self.revision,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "processor": key_values(self.processor),
        }


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are generated."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sample at this temperature; greedy by default.")
    ] = None
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Sample from this share of probability.")] = (
        None
    )
    beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search.")] = 1
    seed: Annotated[int, typer.Option(help="Draws depend on this and on the item alone, whatever the batch.")] = 0

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature is not None or self.top_p is not None

    def settings(self) -> dict[str, Any]:
        """Settings of `FixedVLM.answer`; what decides the answers, for the key of a run."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.sampling:
            chosen |= {"do_sample": True, "temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0}
            chosen["seed"] = self.seed
        if self.beams > 1:
            chosen["num_beams"] = self.beams
        return chosen


def key_values(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["a=1", "b=text"]` -> `{"a": 1, "b": "text"}`; values are JSON where they can be.

    Raises:
        UsageError: a pair without "=".
    """
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--processor {pair!r}: write KEY=VALUE, as in max_pixels=1003520")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value
    return settings


def parse_recipes(text: str) -> list[Recipe]:
    """Recipes separated by ";", no two the same.

    Raises:
        UsageError: an unknown method, key or value, or no recipe at all.
    """
    from vlmfix.recipe import Recipe

    if "all" in (part.strip() for part in text.split(";")):
        raise UsageError(
            "'all' belongs to `vlmfix eval --methods all`; here, name the methods that `vlmfix methods` lists"
        )
    recipes = {str(recipe): recipe for recipe in Recipe.parse_many(text)}
    if not recipes:
        raise UsageError("no recipe given; write method names, as in 'greedy; var'")
    return list(recipes.values())


def with_recipe(vlm: FixedVLM, recipe: Recipe) -> FixedVLM:
    """The loaded model under another recipe; a context that restores it.

    Raises:
        Refusal: the recipe cannot act on this model.
    """
    from vlmfix.api import wrap

    return wrap(vlm.model, vlm.processor, recipe, **vlm.engine)


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """The function with each parameter that is a dataclass of options replaced by its options.

    So commands share options by naming their group once: `def run(source: Path, model: ModelOptions) -> None`.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in groups
    ]
    for group in groups.values():
        inner = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=inner[f.name])
            for f in fields(group)
        ]

    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
