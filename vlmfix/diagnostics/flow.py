"""Relevance that flows through all layers: rollout, gradient-weighted relevance, saliency. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rollout(attention: Sequence[Tensor], start: int = 0) -> Tensor:
    """Attention rollout.

    "Quantifying Attention Flow in Transformers", arXiv 2005.00928: W_l = (A_l + I) / 2, rows summing to one,
    R = W_L ... W_l. In causal models everything drifts to the first token: show visual columns alone, normalised among
    themselves.

    Args:
        attention: per layer [..., T, T], mean over heads.
        start: first layer.

    Returns:
        [..., T, T]; row t is what token t is made of.
    """
    joint: Tensor | None = None
    for weights in attention[start:]:
        step = _with_residual(weights)
        joint = step if joint is None else step @ joint
    if joint is None:
        raise ValueError(f"start={start}: there are only {len(attention)} layers")
    return joint


def rollout_row(attention: Sequence[Tensor], row: int = -1, start: int = 0) -> Tensor:
    """One row [..., T] of `rollout`, by a product of a vector with each layer from the top down."""
    flow = _with_residual(attention[-1])[..., row, :]
    for weights in reversed(attention[start:-1]):
        flow = (flow[..., None, :] @ _with_residual(weights))[..., 0, :]
    return flow


def relevance(attention: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """Gradient-weighted relevance of the self-attention rule, R <- R + C R with C = mean over heads of (dy/dA * A)+.

    "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers", arXiv
    2103.15679, eq. 5 and 6; in a decoder-only VLM pictures and text are one sequence, so this is the bi-modal form.

    Args:
        attention: per layer [..., H, T, T].
        gradient: the same for dy/dA, y the logit of the chosen next token.

    Returns:
        [..., T, T]; row t is what the prediction at token t relies on.
    """
    size = attention[0].shape[-1]
    joint = torch.eye(size, device=attention[0].device, dtype=attention[0].dtype)
    for weights, slope in zip(attention, gradient, strict=True):
        joint = joint + (slope * weights).clamp(min=0).mean(-3) @ joint
    return joint


def gradcam(attention: Tensor, gradient: Tensor) -> Tensor:
    """The last layer alone: (mean over heads of (mean of dy/dA_h) A_h)+, [..., H, T, T] -> [..., T, T]."""
    return (gradient.mean((-1, -2), keepdim=True) * attention).mean(-3).clamp(min=0)


def saliency(attention: Tensor, gradient: Tensor) -> Tensor:
    """|A dL/dA| summed over heads, each layer divided by its Frobenius norm.

    "Hallucination Begins Where Saliency Drops", arXiv 2601.20279, eq. 4 and 5.

    Args:
        attention: [L, H, T, T].
        gradient: the same for dL/dA.

    Returns:
        [L, T, T].
    """
    total = (attention * gradient).abs().tril().sum(-3)
    norm: Tensor = torch.linalg.matrix_norm(total, keepdim=True)
    return total / norm.clamp(min=1e-30)


def saliency_display(attention: Tensor, gradient: Tensor, keep: Tensor) -> Tensor:
    """A picture of saliency between text tokens, as the reference draws it; not the metric.

    Args:
        attention: [L, H, T, T].
        gradient: the same for dL/dA.
        keep: [T] bool, tokens to show.

    Returns:
        [n, n] in [0, 1]: head means brought to [0, 1] by layer, summed, logarithm, brought to [0, 1] again.
    """
    maps = (attention * gradient).abs().tril().mean(-3)[..., keep, :][..., keep]
    return unit(unit(maps).sum(0).log1p())


def unit(maps: Tensor) -> Tensor:
    """[..., n, m] brought to [0, 1] by smallest and largest entry; zeros if constant."""
    low, high = maps.amin((-1, -2), keepdim=True), maps.amax((-1, -2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-30), 0.0)


def _with_residual(weights: Tensor) -> Tensor:
    eye = torch.eye(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    step = weights + eye
    return step / step.sum(-1, keepdim=True)
