"""What methods that raise or lower the scores of key groups share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.method import Glance

MAGNITUDE = 10.0
"""Largest share of its own magnitude by which a score may be moved."""


def per_group(values: Sequence[float], like: Tensor) -> Tensor:
    """[1, 1, G] float32 table for a plan, the same for all rows and heads."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[None, None]


def last_prompt_row(glance: Glance, method: str) -> Tensor:
    """Attention that the last prompt token of each row pays: [B, H, K] float32, K the keys of the glance.

    Raises:
        Refusal: the prompt came in chunks, so that layers were already passed when its last token arrived.
    """
    context = glance.context
    at = context.layout.last - context.past
    if int(at.min()) < 0 or int(at.max()) >= glance.query.shape[2]:
        raise Refusal(
            f"{method} looks at the whole prompt before its first change; leave prefill_chunk_size unset, or start "
            "from an empty cache"
        )
    return glance.rows(at[:, None])[:, :, 0]


def visual_mass(glance: Glance, row: Tensor) -> Tensor:
    """[B, H] share of an attention row [B, H, K] that falls on pictures."""
    return (row * at_slots(glance.context.layout.visual, glance.k_pos)[:, None]).sum(-1)


def at_slots(table: Tensor, slots: Tensor) -> Tensor:
    """Columns `slots` [K] of a prompt table [B, K0]; zero past the prompt."""
    return torch.nn.functional.pad(table, (0, 1))[:, slots.clamp(max=table.shape[1])]


def upper_half(values: Tensor) -> Tensor:
    """[B, H] True for the floor(H / 2) largest values of each row, the lower index first among equals."""
    order = torch.argsort(values, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return rank < values.shape[-1] // 2
