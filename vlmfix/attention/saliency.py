"""Saliency |A * dL/dA| of one query row for many candidate tokens, from the cache, by one vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.attend import Look
from vlmfix.hf.slots import SlotLayer
from vlmfix.kernels.grouped_attention import grouped_attention
from vlmfix.kernels.saliency_row import saliency_row
from vlmfix.plan import Plan


@dataclass
class Tracer:
    """Keeps the graph of one single-token forward from the lowest target layer to the logits.

    Keys and values of earlier positions are constants for everything at the current position, so the gradient of the
    cached forward is exact ("Hallucination Begins Where Saliency Drops", arXiv 2601.20279, eq. 4, on the query row that
    predicts the candidate).

    Args:
        targets: target layers, ascending.
    """

    targets: tuple[int, ...]
    tracing: bool = False
    _outs: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _rows: dict[int, tuple[Callable[[Tensor], Tensor], Tensor]] = field(default_factory=dict, repr=False)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Starts the graph at the lowest target layer; other layers pass through."""
        if layer != self.targets[0]:
            return hidden
        if hidden.is_inference():
            raise Refusal("saliency needs gradients, which torch.inference_mode forbids; use torch.no_grad instead")
        self.tracing = True
        torch.set_grad_enabled(True)
        return hidden.detach().requires_grad_()

    def keep(self, layer: int, out: Tensor, look: Look, plans: Sequence[Plan]) -> None:
        """Keeps a target layer's attention output [B, 1, H, D] and how its saliency follows from gradients."""
        if not self.tracing or layer not in self.targets:
            return
        self._outs[layer] = out
        with torch.no_grad():
            self._rows[layer] = _row(look, plans), look.k_pos

    def saliency(self, logits: Tensor, candidates: Tensor, slots: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Saliency of each candidate, mean over heads; sliding layers have fewer keys than full ones.

        Args:
            logits: [B, V] of the traced forward, with its graph.
            candidates: [B, C] token ids.
            slots: whether attention went over a cache of fixed size, whose gradients take all candidates at once.

        Returns:
            Of all target layers with the same keys [layers, B, C, K] float32 and the slots [K] of the keys.
        """
        outs = [self._outs[layer] for layer in self.targets]

        upstream = direction(logits.detach().float(), candidates).to(logits.dtype)

        def pulled(one: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(logits, outs, one)

        if slots:
            grads = torch.vmap(pulled)(upstream)
        else:  # torch.vmap warns of attention functions that it does not know
            grads = torch.autograd.grad(logits, outs, upstream, is_grads_batched=True)
        parts: dict[int, tuple[list[Tensor], Tensor]] = {}
        with torch.no_grad():
            for layer, grad in zip(self.targets, grads, strict=True):
                row, k_pos = self._rows[layer]
                parts.setdefault(id(k_pos), ([], k_pos))[0].append(row(grad[:, :, 0].transpose(0, 1)))
            return [(torch.stack(rows), k_pos) for rows, k_pos in parts.values()]

    def stop(self, cache: object) -> None:
        """Ends the graph: gradients off, and no cached key keeps it alive."""
        if not self.tracing:
            return
        self.tracing = False
        torch.set_grad_enabled(False)
        self._outs.clear()
        self._rows.clear()
        for layer in getattr(cache, "layers", ()):
            if isinstance(layer, SlotLayer):
                layer.fed = None
            elif getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def direction(logits: Tensor, candidates: Tensor) -> Tensor:
    """softmax(z without c) - e_c, the direction of d(-log p_c)/dz without its cancellation near p_c = 1.

    Args:
        logits: [B, V] float32.
        candidates: [B, C].

    Returns:
        [C, B, V].
    """
    chosen = candidates.T[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    others = logits[None].masked_fill(chosen, float("-inf")).softmax(-1)
    return others.masked_fill(chosen, -1.0)


def score(saliency: Tensor, counted: Tensor) -> Tensor:
    """Score of each candidate in each layer: mean over counted keys of the L2-normalised row.

    Args:
        saliency: [..., B, C, K].
        counted: [B or 1, K] bool, J.

    Returns:
        [..., B, C]; zero where J is empty.
    """
    rows = saliency / saliency.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    count = counted.sum(-1)[:, None].clamp(min=1)
    return torch.where(counted[:, None], rows, 0.0).sum(-1) / count


def _row(look: Look, plans: Sequence[Plan]) -> Callable[[Tensor], Tensor]:
    """What makes the saliency [B, C, K] of the one query from gradients [B, C, H, D] of the attention's output."""
    heads, value = look.query.shape[1], look.value.detach()
    if look.known:
        query, key = look.query.detach(), look.key.detach()
        lse, own, start = (look.known[name] for name in ("lse", "own", "start"))

        def fused(grad: Tensor) -> Tensor:
            return saliency_row(query, key, value, lse, grad, look.scale, own, start=start).saliency / heads

        return fused
    weights = _weights(look, plans)[:, None, :, 0]

    def row(grad: Tensor) -> Tensor:
        dout = grad.float().unflatten(2, (value.shape[1], -1))  # [B, C, Hkv, H / Hkv, D]
        dweights = torch.einsum("bcgrd,bgkd->bcgrk", dout, value.float()).flatten(2, 3)
        return (weights * dweights).abs().mean(2)

    return row


def _weights(look: Look, plans: Sequence[Plan]) -> Tensor:
    """[B, H, 1, K] weights of the one query, as the plans leave them."""
    if not plans:
        return look.rows(torch.zeros(1, dtype=torch.long, device=look.query.device))
    batch, heads, keys = look.key.shape[0], look.key.shape[1], look.key.shape[2]
    unit = torch.eye(keys, device=look.key.device).expand(batch, heads, keys, keys)
    mask, how = look.mask, look.how
    out: Tensor = grouped_attention(look.query, look.key, unit, plans, mask, look.scale, look.q_pos, look.k_pos, **how)
    return out
