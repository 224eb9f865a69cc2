"""What an attention method asks of one layer: data only.

One operation evaluates every plan (`vlmfix.kernels.grouped_attention`). With z = scale * q.k on active rows:

    s_j = z_j * slope(sign z_j, group of j) * key_slope_j + bias(group of j)     then the mask
    p   = softmax(s)
    m_g = sum of p over group g,   o_g = sum of p_j v_j over group g             (and m_w, o_w weighted by key_weight)
    out = sum_g c_g(m) o_g, times the head's scale

Several plans on one layer act in the order of the recipe: slopes multiply, biases add, masses are those of the
modified softmax, factors multiply, head scales multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

FactorRule = Callable[[Tensor], Tensor]
"""Masses [B, H, Q, G] float32 (G + 1 with a key weight, the weighted mass last) -> factors of the same shape."""

HeadRule = Callable[[Tensor, Tensor], Tensor]
"""Head outputs [B, H, D] of the last prompt token with and without pictures -> scale [B, H]; asked in the prefill."""

Sink = Callable[[str, Tensor], None]
"""Receives a statistic by name."""


@dataclass(frozen=True)
class Rolling:
    """Keys at a distance from the current position that belong to `group` whatever the group table says.

    Args:
        group: the group id.
        nearest: smallest distance (0 is the query's own key).
        farthest: largest distance, inclusive.
        start: [B] first position that may belong to it (the end of the prompt, say).
    """

    group: int
    nearest: int
    farthest: int
    start: Tensor


@dataclass(frozen=True)
class Hidden:
    """Keys that some queries must not see: queries at positions >= query_from do not see keys in [start, end).

    Args:
        query_from: [B] first blind query position.
        start: [B] first hidden key position.
        end: [B] position after the last hidden key.
    """

    query_from: Tensor
    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Plan:
    """One method's wishes for one layer. Positions are sequence slots, left padding included; keys past K0 are group 0.

    Args:
        groups: [B, K0] uint8, group id of each prompt key.
        n_groups: G.
        active_from: [B] int64, first query position that is changed.
        slope_pos: [B or 1, H or 1, G] factor on scores z >= 0.
        slope_neg: [B or 1, H or 1, G] factor on scores z < 0; `slope_pos` if absent.
        bias: [B or 1, H or 1, G] added to the scores.
        key_slope: [B, H or 1, K0] factor on the scores of single keys, 1 past K0.
        key_weight: [B, K0] weight of each key's probability in the extra weighted group, 0 past K0.
        rule: factors of the groups from their masses.
        head_scale: [B or 1, H] factor on the head's output, on active rows.
        head_rule: picks the head scale in the prefill (see `AttentionMethod.without_pictures`); excludes `head_scale`.
        hidden: intervals that some queries must not see.
        rolling: a group by distance.
        statistics: names among "mass" (per group), "lse", wanted for active rows.
        sink: receives the statistics.
    """

    groups: Tensor
    n_groups: int
    active_from: Tensor
    slope_pos: Tensor | None = None
    slope_neg: Tensor | None = None
    bias: Tensor | None = None
    key_slope: Tensor | None = None
    key_weight: Tensor | None = None
    rule: FactorRule | None = None
    head_scale: Tensor | None = None
    head_rule: HeadRule | None = None
    hidden: tuple[Hidden, ...] = ()
    rolling: Rolling | None = None
    statistics: frozenset[str] = field(default_factory=frozenset)
    sink: Sink | None = None

    @property
    def only_scales_heads(self) -> bool:
        """Whether attention itself is left alone, so that any attention function's output can be scaled."""
        fields = (self.slope_pos, self.bias, self.key_slope, self.rule, self.sink)
        scales = self.head_scale is not None or self.head_rule is not None
        return scales and not self.hidden and all(x is None for x in fields)
