"""Logits of a residual stream before the last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfix.errors import Refusal
from vlmfix.hf.parts import Parts

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


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
    config = parts.text_config
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits * scale if isinstance(scale, float) else logits
    logits = logits / divisor if isinstance(divisor, float) else logits
    return torch.tanh(logits / cap) * cap if cap else logits


def final_norm(parts: Parts) -> Any:
    """The decoder's last normalisation.

    Raises:
        Refusal: it has none under a known name.
    """
    for name in NORMS:
        if hasattr(parts.decoder, name):
            return getattr(parts.decoder, name)
    raise Refusal(f"{parts.family}: the decoder's final norm could not be found (looked for {', '.join(NORMS)})")
