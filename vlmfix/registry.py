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
        kind: plain, attention, decoding, pruner, view or answer.
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
        "pai",
        "vlmfix.decoders.pai:PAI",
        "attention",
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        "2407.21771",
        "ref-run",
        "raises scores of visual keys by a share of their magnitude",
        "one fused pass",
        ALL,
        {"alpha": 0.5, "prompt_row": True, "layers": (0.0625, 1.0), "on": "visible"},
    ),
    Row(
        "vaf",
        "vlmfix.decoders.vaf:VAF",
        "attention",
        "ClearSight: Visual Signal Enhancement for Object Hallucination Mitigation in Multimodal Large Language Models",
        "2503.13107",
        "ref-run",
        "scales scores of visual keys up and of system keys down in middle layers",
        "one fused pass",
        ALL,
        {"alpha": 0.15, "beta": 0.05, "heads": "all", "layers": (0.28125, 0.46875), "on": "visible"},
    ),
    Row(
        "locore",
        "vlmfix.decoders.locore:LocoRE",
        "attention",
        "Hallucination Begins Where Saliency Drops",
        "2601.20279",
        "derived",
        "raises attention to the last few generated tokens",
        "one fused pass",
        ALL,
        {"beta": 0.15, "window": 8, "own_key": False, "normalise": True, "layers": (0.0, 1.0), "on": "visible"},
    ),
    Row(
        "fia",
        "vlmfix.decoders.fia:FIA",
        "attention",
        "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
        "2501.12206",
        "ref-run",
        "raises scores of the visual tokens that the vision tower's class token singles out",
        "one fused pass",
        ALL,
        {
            "alpha": 0.7,
            "beta": 0.4,
            "local_share": 0.25,
            "head_sensitivity": True,
            "prompt_row": True,
            "layers": (0.0625, 1.0),
            "variant": "paper",
            "on": "visible",
        },
    ),
    Row(
        "vhr",
        "vlmfix.decoders.vhr:VHR",
        "attention",
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        "2412.13949",
        "derived",
        "multiplies the outputs of heads that depend on the picture",
        "text behind the picture twice in the prefill; one product per head",
        ALL,
        {
            "alpha": 2.0,
            "layers": (0.5625, 1.0),
            "second_layer": True,
            "outliers": True,
            "reinforce_text": True,
            "on": "visible",
        },
    ),
    Row(
        "vhr_local",
        "vlmfix.decoders.vhr_local:VHRLocal",
        "attention",
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        "2412.13949",
        "derived",
        "experimental: vhr with heads chosen by the picture's direct effect in each layer",
        "one product per head",
        ALL,
        {"alpha": 2.0, "layers": (0.5625, 1.0), "second_layer": True, "outliers": True, "on": "visible"},
    ),
    Row(
        "vasparse_attention",
        "vlmfix.decoders.vasparse_attention:VASparseAttention",
        "attention",
        "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification",
        "2501.06553",
        "derived",
        "sharpens attention, less on keys that already received much",
        "a sum over keys per layer",
        ALL,
        {"beta": 0.1, "layers": (0.0, 1.0), "on": "visible"},
    ),
    Row(
        "gift",
        "vlmfix.decoders.gift:GIFT",
        "attention",
        "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
        "2510.22067",
        "ref-run",
        "raises attention to what the question's words looked at, and to the question",
        "one fused pass",
        ALL,
        {
            "alpha": 5.0,
            "saliency_layers": (0.34375, 0.375),
            "layers": (0.375, 0.71875),
            "words": "auto",
            "max_weight": None,
            "max_gain": None,
            "on": "visible",
        },
    ),
    Row(
        "carve",
        "vlmfix.decoders.carve:CARVE",
        "view",
        "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning",
        "2509.06461",
        "ref-run",
        "masks and crops the picture to what the question makes the model look at",
        "two more short answers for each picture",
        ALL,
        {
            "instruction": "Write a general description of the image.",
            "layers": (0.625, 0.8125),
            "smoothing": 1e-8,
            "relative": False,
            "keep": 0.2,
            "regions": 3,
            "steps": "all",
            "least_contrast": 1.05,
            "new_tokens": 32,
            "append": False,
        },
    ),
    Row(
        "patches",
        "vlmfix.decoders.patches:Patches",
        "answer",
        "Patch Matters: Training-free Fine-grained Image Caption Enhancement via Local Perception",
        "2504.06666",
        "abstract-only",
        "drops from a description what overlapping crops do not name, adds what all of them name",
        "five more descriptions of each picture",
        ("greedy", "sampling", "beams", "batch", "images", "no-image"),
        {"size": 0.8, "centre": True, "agree": 3, "share": 0.5, "add": 1.0, "instruction": ""},
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
    Row(
        "icd",
        "vlmfix.decoders.icd:ICD",
        "decoding",
        "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding",
        "2403.18715",
        "ref-run",
        "subtracts the logits of a branch under a disturbing instruction",
        "one more row",
        ALL,
        {
            "alpha": 1.0,
            "beta": 0.1,
            "disturbance": "You are a confused object detector.",
            "place": "first",
            "disturbance_ids": None,
            "noise_step": None,
            "total": False,
            "noise_seed": 0,
        },
    ),
    Row(
        "lcd",
        "vlmfix.decoders.lcd:LCD",
        "decoding",
        "Mitigating Hallucinations in Large Vision-Language Models (LVLMs) via Language-Contrastive Decoding (LCD)",
        "2408.04664",
        "ref-run",
        "subtracts the log-probabilities of the text alone, the more the surer they are",
        "one more row, without pictures",
        ALL,
        {"alpha": 2.0, "beta": 0.1, "entropy": True, "variant": "paper", "lm": None},
    ),
    Row(
        "pai_guidance",
        "vlmfix.decoders.pai_guidance:PAIGuidance",
        "decoding",
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs",
        "2407.21771",
        "ref-run",
        "subtracts the log-probabilities of the text alone",
        "one more row, without pictures",
        ALL,
        {"gamma": 1.1, "beta": 0.1},
    ),
    Row(
        "sid",
        "vlmfix.decoders.sid:SID",
        "decoding",
        "Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models",
        "2408.02032",
        "ref-run",
        "subtracts the logits of a branch that sees only the least attended visual tokens",
        "one more row, one attention row of one layer",
        ALL,
        {"alpha": 0.5, "beta": 0.1, "from_layer": 2, "keep_lowest": 0.1736},
    ),
    Row(
        "dola",
        "vlmfix.decoders.dola:DoLa",
        "decoding",
        "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
        "2309.03883",
        "ref-run",
        "subtracts an earlier layer's log-probabilities",
        "the output head once more, for all candidate layers",
        ALL,
        {"layers": None, "bucket": "low", "beta": 0.1, "norm": False, "divergence": "reference", "shared": False},
    ),
    Row(
        "deco",
        "vlmfix.decoders.deco:DeCo",
        "decoding",
        "MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation",
        "2410.11779",
        "abstract-only",
        "adds the logits of the early layer that believes most in a likely token",
        "the output head once more, for all early layers",
        ALL,
        {"alpha": 0.6, "layers": (0.625, 0.90625), "top_k": 20, "top_p": 0.9},
    ),
    Row(
        "avisc",
        "vlmfix.decoders.avisc:AvisC",
        "decoding",
        "Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models",
        "2405.17820",
        "ref-run",
        "subtracts the logits of a branch that sees the picture only through its most attended tokens",
        "one more row, started after the prefill",
        ALL,
        {"alpha": 1.0, "beta": 0.1, "layer_gamma": 0.5, "lamb": 1.0, "fill": "zeros"},
    ),
    Row(
        "iava",
        "vlmfix.decoders.iava:IAVA",
        "decoding",
        "Instruction-Aligned Visual Attention for Mitigating Hallucinations in Large Vision-Language Models",
        "2503.18556",
        "abstract-only",
        "subtracts the logits of a branch that sees only the visual tokens the question does not look at",
        "one more row, started after the prefill; one more prompt in the prefill",
        ALL,
        {
            "alpha": 1.0,
            "beta": 0.1,
            "lamb": 1.0,
            "instruction": "Describe the content of the image.",
            "instruction_ids": None,
        },
    ),
    Row(
        "ritual",
        "vlmfix.decoders.ritual:Ritual",
        "decoding",
        "RITUAL: Random Image Transformations as a Universal Anti-hallucination Lever in Large Vision Language Models",
        "2405.17821",
        "abstract-only",
        "adds the logits of a branch that sees transformed pictures",
        "one more row",
        ALL,
        {"alpha": 3.0, "beta": 0.1, "transform": "random", "transform_seed": 0},
    ),
    Row(
        "agla",
        "vlmfix.decoders.agla:AGLA",
        "decoding",
        "Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention",
        "2406.12718",
        "ref-run",
        "adds the logits of a branch whose pictures are black where they do not match the question",
        "one more row; a matching model or the prefill's attention once per picture",
        ALL,
        {"alpha": 2.0, "beta": 0.5, "source": "own", "share": None, "normalise": False, "colours": None},
    ),
    Row(
        "vasparse_contrast",
        "vlmfix.decoders.vasparse_contrast:VASparseContrast",
        "decoding",
        "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification",
        "2501.06553",
        "derived",
        "subtracts the logits of the last token's embedding alone",
        "the output head once more",
        ALL,
        {"alpha": 0.1, "beta": 0.1, "variant": "paper"},
    ),
    Row(
        "sgrs",
        "vlmfix.decoders.sgrs:SGRS",
        "decoding",
        "Hallucination Begins Where Saliency Drops",
        "2601.20279",
        "ref-run",
        "rejects candidate tokens whose saliency on the answer so far drops",
        "one vector-Jacobian product from the logits to the lowest target layer",
        ("greedy", "sampling", "batch", "streaming", "images", "no-image"),
        {"alpha": 0.6, "top_k": 5, "draws": 3, "window": 5, "layers": (0.1875, 0.28125), "draw": "order", "seed": 0},
    ),
    Row(
        "opera",
        "vlmfix.decoders.opera:OPERA",
        "decoding",
        "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and "
        "Retrospection-Allocation",
        "2311.17911",
        "ref-run",
        "beam search against tokens that later ones lean on; goes back where all beams lean on one",
        "candidates times beams as queries of one forward, one attention row of one layer",
        ("beams", "batch", "images", "no-image"),
        {
            "alpha": 1.0,
            "candidates": 5,
            "scale": 50.0,
            "threshold": 15,
            "rollbacks": None,
            "num_beams": 5,
            "reference_rounding": False,
        },
    ),
)


def names() -> tuple[str, ...]:
    """Names of all methods, those of other packages included."""
    return (*(row.name for row in ROWS), *(point.name for point in entry_points(group=GROUP)))


def find(name: str) -> type[Any]:
    """The class of a method.

    Raises:
        UsageError: no such method (names the nearest), or several of that name.
    """
    row = next((row for row in ROWS if row.name == name), None)
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    targets = [*([row.target] if row is not None else []), *(point.value for point in points)]
    if len(targets) > 1:
        raise UsageError(f"several installed methods are called {name!r}: {', '.join(targets)}; uninstall all but one")
    if row is not None:
        return row.load()  # type: ignore[no-any-return]
    if points:
        return points[0].load()  # type: ignore[no-any-return]
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
