"""Every method by name: literal rows, so that listings import no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from vlmfix.errors import UsageError, nearest

GROUP = "vlmfix.methods"
"""Entry-point group of methods in other packages: name = "module:Class"."""


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        name: word in recipes.
        target: "module:Class".
        kind: plain, attention, decoding, pruner or view.
        title: title of the paper.
        paper: arXiv id, empty for none.
        evidence: ref-run (equal to the run reference), derived, abstract-only, or ours.
        summary: what it changes, in a line.
        cost: extra work per token.
        capabilities: words among greedy, sampling, beams, batch, streaming, images (several), no-image.
        defaults: hyper-parameters.
    """

    name: str
    target: str
    kind: str
    title: str
    paper: str
    evidence: str
    summary: str
    cost: str
    capabilities: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        """Name of the class, public as `vlmfix.<class_name>`."""
        return self.target.partition(":")[2]

    def load(self) -> Any:
        """The method's class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


ALL = ("greedy", "sampling", "beams", "batch", "streaming", "images", "no-image")

ROWS: tuple[Row, ...] = (
    Row(
        "greedy",
        "vlmfix.method:Greedy",
        "plain",
        "plain decoding",
        "",
        "ours",
        "nothing; the reference of every comparison",
        "none",
        ALL,
    ),
    Row(
        "var",
        "vlmfix.decoders.var:VAR",
        "attention",
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "2503.03321",
        "ref-run",
        "moves attention from sink tokens to the other visual tokens in image-centric heads",
        "one fused pass",
        ALL,
        {
            "move_fraction": 0.6,
            "keep_ratio": 0.5,
            "min_mass": 0.2,
            "tau": None,
            "sink_dims": None,
            "layers": (0.0625, 1.0),
            "variant": "paper",
            "on": "visible",
        },
    ),
    Row(
        "vcd",
        "vlmfix.decoders.vcd:VCD",
        "decoding",
        "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
        "2311.16922",
        "ref-run",
        "subtracts the logits of a branch that sees noised pictures",
        "one more row",
        ALL,
        {"alpha": 1.0, "beta": 0.1, "noise_step": 500, "noise_seed": 0},
    ),
    Row(
        "m3id",
        "vlmfix.decoders.m3id:M3ID",
        "decoding",
        "Multi-Modal Hallucination Control by Visual Information Grounding",
        "2403.14003",
        "ref-run",
        "adds the log-probability ratio to a branch without pictures, more with every token",
        "one more row, without pictures",
        ALL,
        {"forget_rate": 0.02, "beta": 0.1, "gate": None, "max_weight": 50.0},
    ),
)


def names() -> tuple[str, ...]:
    """Names of all methods, those of other packages included."""
    return (*(row.name for row in ROWS), *(point.name for point in entry_points(group=GROUP)))


def find(name: str) -> type[Any]:
    """The class of a method.

    Raises:
        UsageError: no such method; names the nearest.
    """
    row = next((row for row in ROWS if row.name == name), None)
    if row is not None:
        return row.load()  # type: ignore[no-any-return]
    for point in entry_points(group=GROUP):
        if point.name == name:
            return point.load()  # type: ignore[no-any-return]
    raise UsageError(f"unknown method {name!r}{nearest(name, names())}")


def row_of(method: Any) -> Row | None:
    """The row of a method's class; None for a class from elsewhere."""
    target = f"{type(method).__module__}:{type(method).__qualname__}"
    return next((row for row in ROWS if row.target == target), None)


def name_of(method: Any) -> str:
    """A method's word in recipes."""
    row = row_of(method)
    if row is not None:
        return row.name
    for point in entry_points(group=GROUP):
        if point.value == f"{type(method).__module__}:{type(method).__qualname__}":
            return point.name
    return getattr(type(method), "recipe_name", type(method).__qualname__)
