"""The public way in: load or wrap a model, answer, generate, apply for a while."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlmfix.applying import applied as applied
from vlmfix.applying import is_applied
from vlmfix.attention.observing import OBSERVERS
from vlmfix.diagnostics.recording import Recording
from vlmfix.engine.graph import Engine
from vlmfix.errors import UsageError, nearest
from vlmfix.fixed import Answer as Answer
from vlmfix.fixed import FixedVLM as FixedVLM
from vlmfix.hf import loading
from vlmfix.preparing import bare
from vlmfix.preparing import compile_for as compile_for
from vlmfix.recipe import Recipe

UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
"""What Python says of a keyword that a function does not have."""


def load(
    model: str | Path = "pico",
    recipe: Any = "greedy",
    *,
    device: str | None = None,
    dtype: Any = None,
    device_map: Any = None,
    revision: str | None = None,
    quantize: str | None = None,
    processor_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    engine: str = "auto",
    compile: bool = False,
    **from_pretrained: Any,
) -> FixedVLM:
    """Loads a checkpoint and wraps it.

    Args:
        model: a Hub id, a folder, or "pico" for the bundled model.
        recipe: as in `wrap`.
        device: "cpu", "cuda", ...; the first GPU if there is one by default.
        dtype: "auto", "float32", "bfloat16", ...; bfloat16 on a GPU, float32 elsewhere by default.
        device_map: spread over devices by accelerate; excludes device.
        revision: branch, tag or commit on the Hub.
        quantize: "4bit" or "8bit" (needs bitsandbytes).
        processor_kwargs: settings of the processor.
        trust_remote_code: run code that a checkpoint brings; off.
        engine: as in `FixedVLM`, like compile.
        compile: compile the decoder's blocks before a step is captured.
        from_pretrained: further keywords of from_pretrained (quantization_config, max_memory, ...).

    Raises:
        UsageError: no such model, one without a processor, or a keyword that nothing takes.
        Refusal: not a model the recipe can act on.
    """
    recipe, _ = Recipe.of(recipe), Engine(engine, compile)  # a slip shows before a checkpoint is read
    try:
        loaded, processor = loading.load(
            model,
            device,
            dtype,
            device_map,
            revision,
            quantize,
            dict(processor_kwargs or {}),
            trust_remote_code,
            from_pretrained,
        )
    except TypeError as error:
        named = UNEXPECTED.search(str(error))
        if named is None or named[1] not in from_pretrained:
            raise
        own = [name for name in inspect.signature(load).parameters if name != "from_pretrained"]
        raise UsageError(
            f"load: neither it nor the model's from_pretrained has a keyword {named[1]!r}{nearest(named[1], own)}"
        ) from error
    return FixedVLM(loaded, processor, recipe, engine, compile)


def wrap(
    model: nn.Module,
    processor: Any,
    recipe: Any = "greedy",
    engine: str = "auto",
    compile: bool = False,
) -> FixedVLM:
    """Wraps a loaded model; see `FixedVLM`."""
    return FixedVLM(model, processor, recipe, engine, compile)


@contextlib.contextmanager
def record(
    model: Any,
    processor: Any = None,
    what: Sequence[str] = ("visual_mass",),
    *,
    layers: Sequence[int] | None = None,
    sink_dims: tuple[int, ...] | None = None,
    tau: float | None = None,
) -> Iterator[Recording]:
    """Records statistics of attention around any generate of a model, with or without a recipe.

    Tokens stay the same: where nothing else acts, the model's own attention function runs and statistics are measured
    beside it. Memory grows with steps, layers and heads alone (`map`: with the prompt instead of heads).

    Args:
        model: a model of AutoModelForImageTextToText, or a `FixedVLM`.
        processor: its processor; only used to find sink dimensions.
        what: names among `vlmfix.diagnostics.recording.WHAT`.
        layers: decoder layers; all by default.
        sink_dims: for `sink_share`: hidden dimensions of massive activations; measured by default.
        tau: for `sink_share`: see `Recording`.

    Yields:
        What was recorded; the last generation's statistics are its attributes.

    Raises:
        UsageError: a name that cannot be recorded.
    """
    if isinstance(model, FixedVLM):
        model, processor = model.model, model.processor
    target = bare(model)
    recording = Recording(target, what, layers, sink_dims, tau)
    with contextlib.ExitStack() as stack:
        if not is_applied(target):
            stack.enter_context(applied(target, processor, "greedy"))
        token = OBSERVERS.set((*OBSERVERS.get(), recording))
        try:
            yield recording
        finally:
            OBSERVERS.reset(token)
