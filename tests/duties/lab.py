"""What the duties share: a model of each family left alone, one under recipes, and runs that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmfix import registry
from vlmfix.api import FixedVLM, wrap
from vlmfix.hf.families import CROSSING, UNBRANCHED
from vlmfix.method import AttentionMethod, DecodingMethod

from ..families import FAMILIES, MAIN, TinyVLM, build
from .table import TABLE

NEW = 4
LOGITS, MARGIN = 2e-5, 1e-3
"""Rows of a batch equal rows alone up to LOGITS; tokens where the best logit leads by MARGIN."""

ROUGH = {"qwen3_5": 5e-5, "minicpmv4_6": 5e-5}
"""Families whose linear attention rounds more, without us too."""

EVERYWHERE = ("greedy", "var", "vcd", "vhr")
METHODS = tuple(row.name for row in registry.ROWS if row.name in TABLE)


def pairs(strength: str, everywhere: bool = False, capability: str = "", main: tuple[str, ...] = MAIN) -> list[Any]:
    """(family, method) parameters: every method on the main families, the rest of the matrix marked wide.

    Args:
        strength: full, whisper or neutral; the first two without plain decoding.
        everywhere: the methods of `EVERYWHERE` on all families belong to the default run.
        capability: only methods that claim these words; "greedy" where a test counts on one row a sample.
        main: the main families; fewer for what happens in transformers' own loops.
    """
    out = []
    for row in registry.ROWS:
        for family in FAMILIES if row.name in TABLE else ():
            if getattr(TABLE[row.name], strength) is None or (strength != "neutral" and row.kind == "plain"):
                continue
            if not set(capability.split()) <= set(row.capabilities) or refused(family, row.name):
                continue
            default = family in main or (everywhere and row.name in EVERYWHERE)
            marks = () if default else (pytest.mark.wide,)
            out.append(pytest.param(family, row.name, marks=marks, id=f"{family}-{row.name}"))
    return out


def refused(family: str, method: str) -> bool:
    """Whether a family cannot run a kind of method; `test_strength` checks that it says so."""
    kind = next(row.kind for row in registry.ROWS if row.name == method)
    if TABLE[method].families and family not in TABLE[method].families:
        return True
    return (branched(method) and family in UNBRANCHED) or (kind == "attention" and family in CROSSING)


@cache
def branched(method: str) -> bool:
    """Whether a method adds branch rows, or runs the prompt without its pictures beside it."""
    from vlmfix.recipe import Recipe

    made = Recipe.parse(TABLE[method].full).methods[0]
    if isinstance(made, AttentionMethod):
        return made.without_pictures() is not None
    return isinstance(made, DecodingMethod) and (bool(made.branches()) or made.late())


@cache
def under(family: str) -> TinyVLM:
    """The family's model on which recipes are installed; `build(family)` has the same weights and is left alone."""
    return build(family, fresh=True)


@cache
def vlm(family: str, recipe: str) -> FixedVLM:
    """A wrapped model, kept for the session."""
    return wrap(under(family).model, None, recipe)


@dataclass(frozen=True)
class Trace:
    """What a generation did: logits [steps, rows, V] before processors, tokens [rows, steps], scores of sequences."""

    logits: Tensor
    tokens: Tensor
    beams: Tensor | None = None

    def row(self, i: int) -> Trace:
        return Trace(self.logits[:, i : i + 1], self.tokens[i : i + 1])


def trace(generate: Any, inputs: Any, **options: Any) -> Trace:
    """Runs a `generate` and notes what it did."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    out = generate(**inputs, **settings, output_logits=True, output_scores=True, return_dict_in_generate=True)
    logits = torch.stack(out.logits)
    return Trace(logits, out.sequences[:, -len(logits) :], getattr(out, "sequences_scores", None))


@cache
def plain(family: str, rows: tuple[int, ...], **options: Any) -> Trace:
    """Plain generation of a batch by the model that is left alone."""
    tiny = build(family)
    return trace(tiny.model.generate, tiny.inputs(rows), **options)


@cache
def fixed(family: str, recipe: str, rows: tuple[int, ...], key: int | None = None, **options: Any) -> Trace:
    """Generation under a recipe; with a key, one row alone as it stands at that place of a batch."""
    tiny = under(family)
    inputs = tiny.inputs(rows) if key is None else tiny.inputs(rows, keys=[key])
    return trace(vlm(family, recipe).generate, inputs, **options)


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two sets of logits; tokens ruled out by both do not count."""
    out = (one == other) | ((one < -1e30) & (other < -1e30))
    return float(torch.where(out, 0.0, one - other).abs().max())


def assert_same(got: Trace, want: Trace, tolerance: float = LOGITS) -> None:
    """Equal logits, and equal tokens where the margin is clear; a row is followed until its tokens part."""
    assert got.logits.shape == want.logits.shape
    for row in range(want.tokens.shape[0]):
        for t in range(want.logits.shape[0]):
            a, b = got.logits[t, row], want.logits[t, row]
            assert difference(a, b) <= tolerance, f"row {row}, step {t}: logits differ by {difference(a, b):.1e}"
            if got.tokens[row, t] != want.tokens[row, t]:
                best = b.topk(2).values
                margin = float(best[0] - best[1])
                assert margin <= MARGIN, f"row {row}, step {t}: another token in spite of a margin of {margin:.1e}"
                break


def normalised(one: Trace) -> Trace:
    """With log-probabilities for logits: some methods' scores are normalised."""
    return Trace(one.logits.log_softmax(-1), one.tokens, one.beams)
