"""Grouped attention: check, choose, call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmfix.kernels.grouped_attention import reference
from vlmfix.plan import Plan

CHUNK = 64
"""Most query rows evaluated at once, so that no score tensor of a whole prompt exists."""


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: Sequence[Plan],
    mask: Tensor | None,
    scale: float,
    q_pos: Tensor,
    k_pos: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention as changed by plans; arguments and result as in `reference.grouped_attention`."""
    return reference.grouped_attention(q, k, v, plans, mask, scale, q_pos, k_pos, softcap, sinks, causal)
