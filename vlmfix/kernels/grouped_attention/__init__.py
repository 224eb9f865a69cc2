"""Grouped attention: check, choose, call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import use_triton
from vlmfix.kernels.grouped_attention import reference
from vlmfix.kernels.grouped_attention.pack import Packed, packed_once, unsupported
from vlmfix.plan import Plan

CHUNK = 64
"""Most query rows evaluated at once, so that no score tensor of a whole prompt exists."""


def served(q: Tensor, k: Tensor, v: Tensor, plans: Sequence[Plan]) -> bool:
    """Whether the Triton kernels take these inputs and plans; any number of query rows then comes at once."""
    return len(plans) > 0 and use_triton(q, k, v) and unsupported(plans) is None


def prepared(k: Tensor, v: Tensor, plans: Sequence[Plan], heads: int) -> Packed | None:
    """Plans as the kernels read them, for callers that keep them; None where the kernels do not serve.

    Args:
        k: [B, Hkv, K, D] as the plans will be called with.
        v: [B, Hkv, K, Dv].
        plans: at least one.
        heads: H.
    """
    return packed_once(plans, heads) if served(k, k, v, plans) else None


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
    consecutive: bool = False,
    spans: tuple[Tensor, Tensor] | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """Attention as changed by plans; arguments and result as in `reference.grouped_attention`.

    `consecutive` promises that k_pos counts up by one, so that keys outside the visible range need not be read.
    `spans` takes the place of a mask where every query sees one run of slots: the first and the one after the last,
    each [B or 1, Q]. `packed` are the plans as `prepared` returned them.
    """
    if packed is not None or served(q, k, v, plans):
        from vlmfix.kernels.grouped_attention.evaluate import evaluate

        return evaluate(
            q, k, v, plans, mask, scale, q_pos, k_pos, softcap, sinks, causal,
            consecutive=consecutive, spans=spans, packed=packed,
        )  # fmt: skip
    if spans is not None:
        low, high = (bound[:, None, :, None] for bound in spans)
        inside = (k_pos >= low) & (k_pos < high)
        if mask is None and causal:
            inside = inside & (k_pos <= q_pos[:, None])
        mask = _both(mask, inside)
    return reference.grouped_attention(q, k, v, plans, mask, scale, q_pos, k_pos, softcap, sinks, causal)


def _both(mask: Tensor | None, inside: Tensor) -> Tensor:
    """A mask that hides, besides what it hid, all keys that are not inside."""
    if mask is None:
        return inside
    return mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, torch.finfo(mask.dtype).min)
