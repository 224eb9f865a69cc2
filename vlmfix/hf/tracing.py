"""Attention of one token over a cache of fixed size, with the gradients that leave it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfix.hf.slots import Frame, Seen
from vlmfix.kernels.gradients import Together
from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.kernels.grouped_attention.pack import Packed
from vlmfix.kernels.saliency_row import saliency_row


def attend_one(
    query: Tensor,
    fed: tuple[Tensor, Tensor],
    key: Tensor,
    value: Tensor,
    frame: Frame,
    seen: Seen,
    scale: float,
    sinks: Tensor | None,
    packed: Packed | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention that nothing changes; all keys but the query's own are constants for its gradient.

    Args:
        query: [B, H, 1, D].
        fed: [B, Hkv, 1, D] and [B, Hkv, 1, Dv], the query's own key and value.
        key: [B, Hkv, C, D], these included.
        value: [B, Hkv, C, Dv], these included.
        frame: where the step stands.
        seen: what the query sees; consecutive.
        scale: factor on q.k.
        sinks: [H] logits that join the softmax's denominator.
        packed: `frame.nothing` as the kernels read it, if known.

    Returns:
        [B, H, 1, Dv], and lse, own and start of the row as `saliency_row` takes them.
    """
    found: dict[str, Tensor] = {}
    plan = replace(frame.nothing, statistics=frozenset({"lse"}), sink=found.__setitem__)
    rest: dict[str, Any] = {"sinks": sinks, "causal": False, "consecutive": True, "packed": packed}
    with torch.no_grad():
        out = grouped_attention(
            query, key, value, (plan,), None, scale, frame.slot, seen.k_pos, spans=(seen.low, seen.high), **rest
        )
    lse, own, start = found["lse"][:, :, 0], seen.own, seen.low[:, 0]
    traced: Tensor = _Row.apply(query, *fed, out, key, value, lse, own, start, scale)  # type: ignore[no-untyped-call]
    return traced, {"lse": lse, "own": own, "start": start}


class _Row(torch.autograd.Function):
    """Hands out a result that is known; gradients go to the query and its own key and value."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, own_key: Tensor, own_value: Tensor, out: Tensor, *rest: Any) -> Tensor:
        *tensors, ctx.scale = rest
        ctx.save_for_backward(query, *tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = Together.apply(_gradients, (grad,), *ctx.saved_tensors, ctx.scale)  # type: ignore[no-untyped-call]
        return (*grads, *([None] * 7))


def _gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, own: Tensor, start: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Gradients [C, B, heads, 1, size] from [C, B, H, 1, Dv]."""
    grad = grad[:, :, :, 0].transpose(0, 1)
    row = saliency_row(query, key, value, lse, grad, scale, own, start=start, dtype=query.dtype, only_gradients=True)
    return tuple(x.transpose(0, 1)[:, :, :, None] for x in (row.dq, row.dk_self, row.dv_self))
