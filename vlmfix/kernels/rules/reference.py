"""Factor rules in plain PyTorch: the definitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def redistribute(masses: Tensor, arguments: Tensor) -> Tensor:
    """Moves probability from attention sinks to the other visual keys in heads that look at the picture.

    Groups: 0 rest, 1 visual, 2 visual sinks, 3 text sinks.
    Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, section 5.

    Args:
        masses: [B, H, Q, 4].
        arguments: [B, 5]: largest share of sinks in the visual mass, smallest visual mass, factor that sinks keep,
            number of visual keys, number of visual sinks. Nothing changes in a row without visual sinks.

    Returns:
        [B, H, Q, 4] factors; their sum weighted by the masses is the sum of the masses.
    """
    share, least, keep, n_visual, n_sinks = arguments.to(masses.dtype)[:, None, None, :].unbind(-1)
    _, plain, sink, text = masses.unbind(-1)
    visual = plain + sink
    chosen = (n_sinks > 0) & (sink <= share * (visual + 1e-6 * n_visual)) & (visual >= least) & (plain > 1e-6)
    boost = 1 + (1 - keep) * (sink + text) / plain.clamp(min=1e-6)
    lowered = torch.where(chosen, keep, 1.0).to(masses.dtype)
    return torch.stack((torch.ones_like(plain), torch.where(chosen, boost, 1.0), lowered, lowered), -1)


def gaze(masses: Tensor, arguments: Tensor) -> Tensor:
    """Weighs visual keys in the most visual heads, raises the question by the same pooled gain; rows sum to one again.

    Groups: 0 rest, 1 visual, 2 question, then the weighted mass of the visual keys.
    Source: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
    arXiv 2510.22067.

    Args:
        masses: [B, H, Q, 4].
        arguments: [B, 2]: number of heads chosen for either group, largest gain.

    Returns:
        [B, H, Q, 4] factors.
    """
    count, cap = arguments.to(masses.dtype)[:, None, None, :].unbind(-1)
    rest, visual, question, weighted = masses.unbind(-1)
    of_visual, of_question = _rank(visual) < count, _rank(question) < count
    before = (visual * of_visual).sum(1, keepdim=True)
    after = (weighted * of_visual).sum(1, keepdim=True)
    gain = torch.where(before > 0, after / torch.where(before > 0, before, 1.0), 1.0).minimum(cap)
    keep, swap = (~of_visual).to(masses.dtype), of_visual.to(masses.dtype)
    lift = torch.where(of_question, gain, 1.0)
    total = rest + keep * visual + swap * weighted + lift * question
    factors = torch.stack((torch.ones_like(rest), keep, lift, swap), -1)
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 1.0)[..., None] * factors


def _rank(mass: Tensor) -> Tensor:
    """Rank of each head [B, H, Q] by mass, 0 the largest; equal heads in order of index."""
    index = torch.arange(mass.shape[1], device=mass.device)
    a, b = mass[:, :, None], mass[:, None, :]
    earlier = (index[None, :] < index[:, None])[None, :, :, None]
    return ((b > a) | ((b == a) & earlier)).sum(2)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"redistribute": redistribute, "gaze": gaze}
"""Every rule by name."""

POOLED = frozenset({"gaze"})
"""Rules that need the masses of all heads at once."""
