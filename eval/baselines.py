"""Arms that a claimed gain must beat: trivial baselines, controls of contrastive decoding, placebos. Data only.

An arm is answered by the model, with its recipe, prompt suffix and settings, or derived from the reference's answers.
The settings that a model must understand: transformers' sampling settings; `eos_bias`, added to the logit of the end
token; `placebo` (see `PLACEBOS`) with `placebo_seed`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UsageError, nearest
from .base import Item
from .benchmarks.margins import best_offset
from .guards import Record

CLEARLY = " Mention only what you clearly see."
PLACEBOS: Mapping[str, str] = {
    "text-keys": "the same strength on as many text keys, drawn at random, as there are visual keys",
    "heads": "the same strength on as many heads of each layer, drawn at random",
    "other-picture": "the contrast branch sees the picture of another item",
}
"""Kind -> what is done instead of the method's own choice."""
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
NO_CONTRAST: Mapping[str, float] = {"alpha": 0, "forget_rate": 0, "gamma": 1}
"""Strength of a contrastive method -> value that leaves only its plausibility mask."""
_METHOD = re.compile(r"\s*([^()+]+?)\s*(?:\((.*)\))?\s*", re.S)


@dataclass(frozen=True)
class Arm:
    """One row of a table before it is run.

    Args:
        name: what the table calls it.
        kind: `reference`, `control`, `baseline`, `placebo` or `method`.
        recipe: recipe text.
        suffix: appended to every prompt.
        settings: added to the run's generation settings.
        derive: (`sentences`, k), (`words`, k) or (`offset`, x): made from the reference's answers, nothing generated.
    """

    name: str
    kind: str = "method"
    recipe: str = "greedy"
    suffix: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    derive: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if self.derive and self.derive[0] not in DERIVED:
            raise UsageError(
                f"{self.name}: cannot derive answers by {self.derive[0]!r}{nearest(self.derive[0], DERIVED)}"
            )


GREEDY = Arm("greedy", "reference")


def trivial(
    captions: bool, sentences: Sequence[int] = (2, 4), bias: float = 1.0, offset: float | None = None
) -> list[Arm]:
    """Baselines without any method.

    Args:
        captions: whether the benchmark asks for descriptions; else for yes or no.
        sentences: numbers of first sentences kept of the reference's captions.
        bias: added to the logit of the end token.
        offset: threshold on the yes-no margin, found on the tuning split; no such row if None.
    """
    arms = [Arm("ask for what is clear", "baseline", suffix=CLEARLY)]
    if captions:
        arms += [Arm(f"first {k} sentences", "baseline", derive=("sentences", k)) for k in sentences]
        arms.append(Arm(f"end bias {bias:g}", "baseline", settings={"eos_bias": bias}))
    elif offset is not None:
        arms.append(Arm(f"yes/no offset {offset:g}", "baseline", derive=("offset", offset)))
    return arms


def controls(recipes: Sequence[str], contrastive: Mapping[str, str]) -> list[Arm]:
    """Rows beside contrastive recipes: sampling, and sampling with the plausibility mask but no contrast.

    Args:
        recipes: recipe texts of the table.
        contrastive: contrastive method -> name of its strength.
    """
    masked: dict[str, None] = {}
    for recipe in recipes:
        for method, strength in contrastive.items():
            if method in methods_of(recipe):
                masked[with_value(recipe, method, strength, NO_CONTRAST.get(strength, 0))] = None
    if not masked:
        return []
    sampled = [Arm(f"sampling + mask: {recipe}", "control", recipe, settings=SAMPLING) for recipe in masked]
    return [Arm("sampling", "control", settings=SAMPLING), *sampled]


def placebos(recipe: str, kinds: Sequence[str], seed: int = 0) -> list[Arm]:
    """Placebo arms of a recipe, one for each kind of `PLACEBOS` that its methods know.

    Raises:
        UsageError: for an unknown kind.
    """
    for kind in kinds:
        if kind not in PLACEBOS:
            raise UsageError(f"unknown placebo {kind!r}{nearest(kind, PLACEBOS)}")
    return [
        Arm(f"{recipe} [placebo: {kind}]", "placebo", recipe, settings={"placebo": kind, "placebo_seed": seed})
        for kind in kinds
    ]


def other_pictures(items: Sequence[Item], seed: int = 0) -> dict[str, str]:
    """Picture -> another picture of the benchmark, a permutation without fixed point drawn from the seed.

    Raises:
        UsageError: if there are fewer than two pictures.
    """
    names = list(dict.fromkeys(item.image for item in items))
    if len(names) < 2:
        raise UsageError("contrast with another item's picture needs at least two pictures")
    random.Random(seed).shuffle(names)
    return dict(zip(names, [*names[1:], names[0]], strict=True))


def offset_of(items: Sequence[Item], records: Sequence[Record]) -> float:
    """Threshold on the yes-no margin with the most right answers, for `trivial`.

    Args:
        items: of the tuning split, with `label` in their truth.
        records: the reference's, with `margin`.

    Raises:
        UsageError: naming an answer without a margin, or if nothing is answered.
    """
    found = {str(record["id"]): record.get("margin") for record in records if "text" in record}
    kept = [item for item in items if item.id in found]
    for item in kept:
        if not isinstance(found[item.id], (int, float)):
            raise UsageError(f"item {item.id!r} has no yes-no margin; run the reference with margins recorded")
    if not kept:
        raise UsageError("no tuning item is answered; run the reference on them first")
    margins = np.array([found[item.id] for item in kept], dtype=np.float64)
    return best_offset(margins, np.array([item.truth["label"] == "yes" for item in kept]))


def first_sentences(text: str, count: float) -> str:
    """The first sentences; one ends at . ! ? before white space."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[: int(count)])


def first_words(text: str, count: float) -> str:
    """The first words (pieces between white space), what lies between them unchanged."""
    found = list(re.finditer(r"\S+", text))[: int(count)]
    return text[: found[-1].end()] if found else ""


def derived(arm: Arm, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records of an arm made from the reference's records; costs are left out, since nothing was generated.

    Raises:
        UsageError: naming an answer without the margin that an offset needs.
    """
    if arm.derive is None:
        raise UsageError(f"{arm.name} is answered by the model, not derived")
    kind, value = arm.derive
    return [
        {key: record[key] for key in ("id", "image", "prompt", "margin") if key in record}
        | {"text": DERIVED[kind](record, value)}
        for record in records
        if "text" in record
    ]


def methods_of(recipe: str) -> list[str]:
    """Names of the methods of a recipe text."""
    return [name for name, _ in parts_of(recipe)]


def with_value(recipe: str, method: str, key: str, value: Any) -> str:
    """A recipe text with one hyper-parameter of one method set.

    Raises:
        UsageError: if the recipe does not hold the method.
    """
    parts = []
    if method not in methods_of(recipe):
        raise UsageError(f"recipe {recipe!r} has no method {method!r}; it has {', '.join(methods_of(recipe))}")
    for name, arguments in parts_of(recipe):
        if name == method:
            kept = [a for a in split(arguments, ",") if a.strip() and a.partition("=")[0].strip() != key]
            arguments = ", ".join([*(a.strip() for a in kept), f"{key}={value!r}"])
        parts.append(f"{name}({arguments})" if arguments else name)
    return "+".join(parts)


def _offset(record: Record, value: float) -> str:
    margin = record.get("margin")
    if not isinstance(margin, (int, float)):
        raise UsageError(f"item {record.get('id')!r} has no yes-no margin; run the reference with margins recorded")
    return "Yes" if margin > value else "No"


DERIVED: Mapping[str, Callable[[Record, float], str]] = {
    "sentences": lambda record, k: first_sentences(record["text"], k),
    "words": lambda record, k: first_words(record["text"], k),
    "offset": _offset,
}
"""How answers are derived: name -> (record, value) -> text."""


def parts_of(recipe: str) -> list[tuple[str, str]]:
    """(method, arguments) of each part of a recipe text."""
    found = []
    for part in split(recipe, "+"):
        match = _METHOD.fullmatch(part)
        if not match:
            raise UsageError(f"{part!r} in the recipe {recipe!r} is not METHOD or METHOD(key=value, ...)")
        found.append((match[1], match[2] or ""))
    return found


def split(text: str, mark: str) -> list[str]:
    """Pieces between marks that stand outside brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == mark and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += c
    return pieces
