"""Rotary position embedding: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """X * cos + (-x2, x1) * sin of queries and keys, x1 and x2 being the halves of x.

    Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864, equation 34, with the
    pairs a half apart, as transformers' `apply_rotary_pos_emb` has them.

    Args:
        q: [B, H, Q, D].
        k: [B, Hkv, Q, D].
        cos: [B or 1, Q, D].
        sin: [B or 1, Q, D].
        unsqueeze_dim: where cos and sin get the axis of the heads.

    Returns:
        [B, H, Q, D] and [B, Hkv, Q, D], each product and the sum rounded to its dtype.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def rotary_gradient(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of x for C gradients of the result: grad * cos + (s2, -s1), s being grad * sin.

    Args:
        grad: [C, B, H, Q, D].
        cos: [B or 1, Q, D].
        sin: [B or 1, Q, D].

    Returns:
        [C, B, H, Q, D].
    """
    return grad * cos.unsqueeze(1) - _turned(grad * sin.unsqueeze(1))


def _turned(x: Tensor) -> Tensor:
    """(-x2, x1)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)
