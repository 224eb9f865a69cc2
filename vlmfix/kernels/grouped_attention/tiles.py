"""Launching the tile kernel: configuration, splits of the keys, work lists, and what it writes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vlmfix.kernels.dispatch import INTERPRETED, ceil_div, launches, multiprocessors, operation, power_of_two
from vlmfix.kernels.grouped_attention.arguments import common
from vlmfix.kernels.grouped_attention.triton_members import members
from vlmfix.kernels.grouped_attention.triton_ruled import no_rule
from vlmfix.kernels.grouped_attention.triton_tiles import tiles_kernel
from vlmfix.kernels.rules.triton import RULES

PARTS: torch.dtype | None = None
"""Element type in which parts wait for the masses; None for that of the values."""


@operation("grouped_tiles")
def grouped_tiles(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, low: Tensor | None,
    high: Tensor | None, groups: Tensor | None, active: Tensor, tables: Tensor | None, key_slope: Tensor | None,
    key_weight: Tensor | None, hidden: Tensor | None, roll_start: Tensor | None, scale: float, softcap: float,
    n_groups: int, rolling: list[int], causal: bool, consecutive: bool, signed: bool, head_scale: Tensor | None,
    sinks: Tensor | None, direct: bool, arguments: Tensor | None, rule: str, rule_plan: int, radix: int, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The finished output where one pass can write it, else partial results as from `grouped_split`.

    Parameters as in `arguments.common`, then whether slopes depend on the sign of the score, and what only the output
    needs: head_scale [P, B, H], sinks [H], `direct` (no rule and no statistics: all groups are one kind), and a fused
    rule that does not pool heads, as in `grouped_merge` ("" for none).

    Returns:
        acc, stat and out; out [B, H, Q, Dv] is empty where partial results were written, else acc is.
    """
    leading, constants = common(
        q, k, v, mask, q_pos, k_pos, low, high, groups, active, tables, key_slope, key_weight, hidden, roll_start,
        scale, softcap, n_groups, rolling, causal, consecutive,
    )  # fmt: skip
    batch, heads, queries, _ = q.shape
    kinds, splits, finish, config = _shapes(q, k, v, n_groups, key_weight is not None, direct, rule)
    acc, stat, out = _results(q, k, v, kinds, splits, finish)
    items = batch * heads * ceil_div(queries, config["M"])
    order = ranks = counter = scratch = None
    programs = items
    if groups is not None and (kinds > 1 or tables is not None) and roll_start is None:
        order, ranks, counter = members(groups, k_pos, n_groups, consecutive)
    if finish and kinds > 1:
        programs = min(items, multiprocessors(q.device.index) * (1 if config["M"] >= 128 else 2))
        counter = torch.zeros(1, dtype=torch.int32, device=q.device) if counter is None else counter
        shape = programs, kinds - 1, config["M"], power_of_two(v.shape[3], 16)
        scratch = torch.empty(shape, dtype=PARTS or v.dtype, device=q.device)
    launches["grouped_tiles"] += 1
    tiles_kernel[(programs, splits, 1 if finish else kinds)](
        *leading, order, ranks, counter, head_scale, sinks, arguments, scratch, acc, stat, out, items, splits,
        rule_plan, *(out.stride()[:3] if finish else (0, 0, 0)), R=kinds, RB=power_of_two(kinds), SIGNED=signed,
        WEIGHTS=key_weight is not None and not direct, HEAD_SCALE=head_scale is not None, SINKS=sinks is not None,
        RULE=RULES.get(rule, no_rule), RULE_RADIX=radix, RULE_SIZE=size, PB=power_of_two(size + 1),
        N_ARGUMENTS=0 if arguments is None else arguments.shape[1], FINISH=finish, **constants, **config,
    )  # fmt: skip
    return acc, stat, out


@grouped_tiles.register_fake  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, low: Tensor | None,
    high: Tensor | None, groups: Tensor | None, active: Tensor, tables: Tensor | None, key_slope: Tensor | None,
    key_weight: Tensor | None, hidden: Tensor | None, roll_start: Tensor | None, scale: float, softcap: float,
    n_groups: int, rolling: list[int], causal: bool, consecutive: bool, signed: bool, head_scale: Tensor | None,
    sinks: Tensor | None, direct: bool, arguments: Tensor | None, rule: str, rule_plan: int, radix: int, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kinds, splits, finish, _ = _shapes(q, k, v, n_groups, key_weight is not None, direct, rule)
    return _results(q, k, v, kinds, splits, finish)


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, n_groups: int, weighted: bool, direct: bool, rule: str
) -> tuple[int, int, bool, dict[str, int]]:
    """Kinds, splits of the keys, whether the kernel writes the output, and the launch configuration."""
    batch, heads, queries, size = q.shape
    processors = multiprocessors(q.device.index)
    kinds = 1 if direct else n_groups * (2 if weighted else 1)
    config = _config(batch * heads, queries, k.shape[2], max(size, v.shape[3]), q.element_size(), processors)
    items = batch * heads * ceil_div(queries, config["M"])
    splits = _splits(items, ceil_div(k.shape[2], config["N"]), processors)
    return kinds, splits, splits == 1 and (direct or (rule != "" and not weighted)), config


def _splits(items: int, tiles: int, processors: int) -> int:
    """Splits of the keys: none if the blocks of rows fill the machine, else about seven steps or more in each."""
    return 1 if items >= processors else min(max(2, processors // items), ceil_div(tiles, 7))


@cache
def _config(heads: int, queries: int, keys: int, size: int, bytes_each: int, processors: int) -> dict[str, int]:
    """Launch configuration; `heads` counts those of all rows of the batch."""
    wide = size * bytes_each
    exact = bytes_each == 4  # float32 tiles of 128 rows and three stages exceed the shared memory of sm_90
    most = (64 if exact else 128) if wide <= 256 else 32 if exact else 64
    few = heads * ceil_div(queries, most) < 3 * processors
    if few:
        most = min(most, 64)  # smaller blocks spread better
    rows = power_of_two(min(queries, most), 16)
    return {
        "M": rows,
        "N": 16 if INTERPRETED else max(16, min(32 if few and keys < 2048 else 64, 16384 // power_of_two(wide))),
        "num_warps": 8 if rows >= 128 else 4,
        "num_stages": 2 if wide > 256 or exact else 3,
    }


def _results(q: Tensor, k: Tensor, v: Tensor, kinds: int, splits: int, finish: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, _ = q.shape
    n_kv, size_v = k.shape[1], v.shape[3]
    rows = queries * (heads // n_kv) * kinds
    acc = torch.empty((0,) if finish else (batch, n_kv, splits, rows, size_v), dtype=torch.float32, device=q.device)
    stat = torch.empty((0,) if finish else (2, batch, n_kv, splits, rows), dtype=torch.float32, device=q.device)
    out = v.new_empty((batch, queries, heads, size_v) if finish else (0, 0, 0, 0)).transpose(1, 2)
    return acc, stat, out
