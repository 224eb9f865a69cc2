"""The output of each key group on its own: what a head would add to its output from the picture alone, say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import rows_contiguous, use_triton
from vlmfix.kernels.grouped_attention import reference
from vlmfix.kernels.grouped_attention.pack import packed_once, unsupported
from vlmfix.plan import Plan


def group_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    mask: Tensor | None,
    scale: float,
    q_pos: Tensor,
    k_pos: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Masses and partial outputs of a plan's groups, before any factor rule or head scale.

    Args:
        q: as the rest in `reference.grouped_attention`; few query rows.
        k: keys.
        v: values.
        plan: its groups, slopes, biases and hidden intervals count; key weights, rule and statistics do not.
        mask: bool or additive float.
        scale: factor on q.k.
        q_pos: [Q].
        k_pos: [K].
        softcap: soft cap of the scores.
        sinks: [H].
        causal: whether an absent mask means causal.

    Returns:
        masses [B, H, Q, G] float32 and outputs [B, H, Q, G, Dv] in v's dtype, the sum of p_j v_j over each group, so
        that the outputs add up to attention's.
    """
    if plan.slope_pos is None and plan.bias is None:  # grouped for its statistics alone
        plan = replace(plan, statistics=frozenset({"mass"}))
    plan = replace(plan, rule=None, head_scale=None, head_rule=None, key_weight=None, sink=None)
    if not use_triton(q, k, v) or unsupported([plan]):
        return _plain(q, k, v, plan, mask, scale, q_pos, k_pos, softcap, sinks, causal)
    from vlmfix.kernels.grouped_attention.triton import grouped_split
    from vlmfix.kernels.grouped_attention.triton_merge import grouped_masses, grouped_merge

    packed = packed_once([plan], q.shape[1])
    acc, stat = grouped_split(
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), mask if mask is None else rows_contiguous(mask),
        q_pos, k_pos, None, None, packed.groups, packed.active, packed.tables, packed.key_slope, None, packed.hidden,
        packed.roll_start, scale, softcap or 0.0, packed.n_groups, list(packed.rolling), causal and mask is None, False,
    )  # fmt: skip
    masses, _ = grouped_masses(stat, sinks, q_pos, q.shape[1], packed.n_groups, False)
    chosen = torch.eye(packed.n_groups, device=q.device)
    rest = (sinks, None, packed.active, q_pos, None, "", 0, 1, 1, False, packed.n_groups, False, v.dtype, False)
    outputs = [grouped_merge(acc, stat, one.expand_as(masses).contiguous(), *rest)[0] for one in chosen]
    return masses, torch.stack(outputs, 3)


def _plain(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *rest: object) -> tuple[Tensor, Tensor]:
    """By the definition: one pass per group, with a rule that keeps nothing else."""
    every = torch.zeros_like(plan.active_from)
    seen: list[Tensor] = []

    def only(group: int) -> Callable[[Tensor], Tensor]:
        def rule(masses: Tensor) -> Tensor:
            seen.append(masses)
            return torch.zeros_like(masses).index_fill(-1, torch.tensor(group, device=masses.device), 1.0)

        return rule

    outputs = []
    for group in range(plan.n_groups):
        part = Plan(plan.groups, plan.n_groups, every, rule=only(group), rolling=plan.rolling)
        outputs.append(reference.grouped_attention(q, k, v, [plan, part], *rest))  # type: ignore[arg-type]
    return seen[0], torch.stack(outputs, 3)
