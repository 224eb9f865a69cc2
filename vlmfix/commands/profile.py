"""`vlmfix profile`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmfix.commands.console import emit, note, show, table
from vlmfix.commands.options import Json, Methods, ModelOptions, parse_recipes, with_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmfix.api import FixedVLM


def profile(
    model: ModelOptions,
    methods: Methods = "greedy; var; vcd",
    image: Annotated[Path | None, typer.Option(help="A picture; noise by default.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What is asked about it.")] = "Describe the image.",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in the batch.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated per row.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that warms up; the median counts.")] = 5,
    as_json: Json = False,
) -> None:
    """Time the first token (picture, prompt and prefill) and every further token, per recipe."""
    import vlmfix.pictures as pictures

    recipes = parse_recipes(methods)
    picture = _noise() if image is None else pictures.load(image)
    vlm = model.load()
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        note(f"timing {recipe}")
        with with_recipe(vlm, recipe) as mitigated:
            rows.append(_measure(mitigated, [picture] * batch_size, prompt, tokens, repeats))
    base = rows[0]
    for row in rows:
        row["decode_ratio"] = row["decode_ms"] / base["decode_ms"]
    if as_json:
        emit(rows)
        return
    columns = ["recipe", "first token ms", "further token ms", "± spread", f"x {base['recipe']}", "peak GPU MiB"]
    show(table(columns, map(_cells, rows), f"{model.model}, batch {batch_size}, {tokens} tokens, {repeats} runs"))


def _measure(vlm: FixedVLM, images: list[Image], prompt: str, tokens: int, repeats: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    prompts = [prompt] * len(images)
    firsts: list[float] = []
    steps: list[float] = []
    for turn in range(repeats + 1):
        if cuda and turn == 1:
            torch.cuda.reset_peak_memory_stats()
        first, full = (_seconds(vlm, images, prompts, count) for count in (1, tokens))
        if turn:
            firsts.append(1000 * first)
            steps.append(1000 * (full - first) / (tokens - 1))
    return {
        "recipe": str(vlm.recipe),
        "first_token_ms": statistics.median(firsts),
        "decode_ms": statistics.median(steps),
        "decode_spread_ms": (max(steps) - min(steps)) / 2,
        "peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "report": vlm.report,
    }


def _seconds(vlm: FixedVLM, images: list[Image], prompts: list[str], tokens: int) -> float:
    started = time.perf_counter()
    vlm.answer(images, prompts, max_new_tokens=tokens, min_new_tokens=tokens)
    return time.perf_counter() - started


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    peak = row["peak_gpu_mib"]
    numbers = (row["first_token_ms"], row["decode_ms"], row["decode_spread_ms"], row["decode_ratio"])
    return row["recipe"], *(f"{number:.2f}" for number in numbers), "" if peak is None else f"{peak:.0f}"


def _noise() -> Image:
    from PIL import Image

    return Image.effect_noise((336, 336), 64).convert("RGB")
