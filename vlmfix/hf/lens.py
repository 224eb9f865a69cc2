"""Logits of a residual stream before the last layer."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.parts import Parts

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm", "layer_norm")


def lens(parts: Parts, hidden: Tensor, norm: bool) -> Tensor:
    """Applies the model's output head to a residual stream.

    Args:
        parts: the model.
        hidden: [B, width].
        norm: whether the decoder's final norm comes first.

    Returns:
        [B, V] float32, scaled and soft-capped as the model's own logits.
    """
    head: Any = parts.top.get_output_embeddings()
    if head is None:
        raise Refusal(f"{parts.family}: the output head could not be found, so early layers have no logits")
    if norm:
        hidden = final_norm(parts)(hidden)
    logits: Tensor = head(hidden).float()
    kind: type = type(parts.top)
    factors = _factors(kind)
    config = parts.text_config
    if "logit_scale" in factors:
        logits = logits * config.logit_scale
    if "logits_scaling" in factors:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None) if "final_logit_softcapping" in factors else None
    return torch.tanh(logits / cap) * cap if cap else logits


@cache
def _factors(top: type) -> frozenset[str]:
    """Names of what a model's forward does to the output of its head; a text configuration may name more."""
    text = inspect.getsource(top.forward)  # type: ignore[attr-defined]
    return frozenset(name for name in ("logit_scale", "logits_scaling", "final_logit_softcapping") if name in text)


def final_norm(parts: Parts) -> Any:
    """The decoder's last normalisation.

    Raises:
        Refusal: it has none under a known name.
    """
    decoder: Any = parts.decoder
    inner = [getattr(decoder, name, None) for name in ("model", "decoder")]
    inner.append(getattr(inner[0], "decoder", None))
    for module in (decoder, *inner):
        for name in NORMS:
            if module is not None and isinstance(norm := getattr(module, name, None), torch.nn.Module):
                return norm
    raise Refusal(f"{parts.family}: the decoder's final norm could not be found (looked for {', '.join(NORMS)})")
