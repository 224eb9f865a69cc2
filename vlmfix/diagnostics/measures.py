"""Measures of attention: pure functions from masses, rows, head outputs and residual streams to numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_HEADS = 4
"""Heads per layer that T-VHD sums; the paper's number is not published."""


def t_vhd(divergence: Tensor, top: int = TOP_HEADS) -> Tensor:
    """Token-level vision-aware head divergence: per layer the largest of the heads, summed over heads and layers.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, eq. 5.

    Args:
        divergence: [..., L, H] distance of head outputs with and without pictures, eq. 4.
        top: heads per layer.

    Returns:
        [...]; low values mark tokens that the language prior alone would give.
    """
    return divergence.topk(min(top, divergence.shape[-1]), -1).values.sum((-1, -2))


@dataclass(frozen=True)
class Dominance:
    """How much more attention a prompt token of text gets than one of a picture, all [...].

    Args:
        mdi: modality dominance index; above 1 text dominates.
        aei_text: attention efficiency of text: its share of attention over its share of tokens.
        aei_visual: the same of pictures.
    """

    mdi: Tensor
    aei_text: Tensor
    aei_visual: Tensor


def text_dominance(text: Tensor, visual: Tensor, n_text: Tensor | int, n_visual: Tensor | int) -> Dominance:
    """MDI and AEI of arXiv 2508.10552; attention to generated tokens is left out.

    Args:
        text: [...] attention mass on the prompt's text, mean over heads and generated rows.
        visual: [...] the same on pictures.
        n_text: number of text tokens. Whether the first token, a sink, is among them is the caller's choice; say which.
        n_visual: number of visual tokens.
    """
    total = text + visual
    text, visual, tokens = text / total, visual / total, n_text + n_visual
    return Dominance(
        mdi=(text / n_text) / (visual / n_visual),
        aei_text=text / (n_text / tokens),
        aei_visual=visual / (n_visual / tokens),
    )


def sink_ratio(sinks: Tensor, visual: Tensor, n_visual: Tensor | int) -> Tensor:
    """Share of the visual mass that falls on visual sinks.

    "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321.

    Args:
        sinks: [...] mass on visual sinks.
        visual: [...] mass on all visual tokens, sinks included.
        n_visual: number of visual tokens; 1e-6 is added for each, as in the released code.
    """
    return sinks / (visual + 1e-6 * n_visual)


def image_centric(ratio: Tensor, visual: Tensor, most: float = 0.5, least: float = 0.2) -> Tensor:
    """Whether a row looks at pictures and not only at their sinks.

    Args:
        ratio: [...] of `sink_ratio`.
        visual: [...] visual mass.
        most: largest ratio.
        least: smallest visual mass.
    """
    return (ratio <= most) & (visual >= least)


def entropy(row: Tensor, normalise: bool = False) -> Tensor:
    """Entropy in nats of attention rows [..., N] over visual tokens, as they are or brought to sum one ([...])."""
    row = row / row.sum(-1, keepdim=True) if normalise else row
    total: Tensor = torch.special.xlogy(row, row).sum(-1)
    return -total


@dataclass(frozen=True)
class Sink:
    """One token that behaves like the first.

    Args:
        token: its position.
        layers: entries of the list of residual streams in which it does.
        kind: "primary" (through nearly all layers), "secondary", or "noise" (in fewer than five).
    """

    token: int
    layers: tuple[int, ...]
    kind: str


def secondary_sinks(
    hidden: Tensor, first: int = 0, threshold: float = 0.9, margin: int = 15
) -> tuple[Tensor, list[Sink]]:
    """Tokens whose residual stream points where the first token's points.

    As in arXiv 2512.22213: between the layer in which the first token's norm jumps and the one in which it falls,
    tokens with |cosine| above the threshold; the first token is one of them.

    Args:
        hidden: [L, T, width] residual streams, embeddings first.
        first: position of the first token.
        threshold: of the cosine.
        margin: a sink in at least L - margin entries is primary, in five or more secondary; set for 28 to 64 layers, so
            that shallower models have no secondary sinks unless it is lowered.

    Returns:
        [L, T] bool, and the sinks by token.
    """
    hidden = hidden.float()
    own = hidden[:, first]
    jumps = own.norm(dim=-1).diff()
    start = int(jumps.argmax()) + 1
    end = start + int(jumps[start:].argmin()) + 1 if start < len(jumps) else len(own)
    cosine = torch.nn.functional.cosine_similarity(hidden, own[:, None], dim=-1).abs()
    found = torch.zeros_like(cosine, dtype=torch.bool)
    found[start:end, first:] = cosine[start:end, first:] > threshold
    sinks = []
    for token in found.any(0).nonzero()[:, 0].tolist():
        layers = tuple(found[:, token].nonzero()[:, 0].tolist())
        kind = "primary" if len(layers) >= len(hidden) - margin else "secondary" if len(layers) >= 5 else "noise"
        sinks.append(Sink(token, layers, kind))
    return found, sinks
