"""Cases of `benchmarks/kernels.py`: the other operations, each beside its definition in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import DEVICE, L2, Case, Inputs, random, share_of_budget
from vlmfix.kernels.contrast import contrast_and_choose
from vlmfix.kernels.dispatch import reference_only
from vlmfix.kernels.kv_compact import kv_compact
from vlmfix.kernels.kv_compact import reference as compact_reference
from vlmfix.kernels.row_block import column_mass, row_block
from vlmfix.kernels.row_block import reference as row_reference
from vlmfix.kernels.saliency_row import reference as saliency_reference
from vlmfix.kernels.saliency_row import saliency_row


def row_inputs(batch: int, heads: int, n_kv: int, rows: int, keys: int) -> Inputs:
    """Queries, keys and the rows' log-sum-exp."""
    q, k = random(batch, heads, rows, 128), random(batch, n_kv, keys, 128)
    z = q.float() @ k.float().repeat_interleave(heads // n_kv, 1).mT * 128**-0.5
    lse = z.logsumexp(-1)
    return {"q": q, "k": k, "v": random(batch, n_kv, keys, 128), "lse": lse, "scale": 128**-0.5}


def without_v(x: Inputs) -> list[Any]:
    """Queries, keys, log-sum-exp and scale."""
    return [x[name] for name in ("q", "k", "lse", "scale")]


def doubled(x: Any) -> Any:
    """The same inputs in float64."""
    if isinstance(x, dict):
        return {name: doubled(value) for name, value in x.items()}
    if isinstance(x, list):
        return [doubled(value) for value in x]
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


def compared(ours: Callable[..., Any], definition: Callable[..., Any], x: Inputs, rounding: torch.dtype) -> float:
    """Largest share of the budget over all results of an operation."""
    results = [f(x if i < 2 else doubled(x)) for i, f in enumerate((ours, definition, definition))]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    return max(share_of_budget(*parts, rounding) for parts in zip(*results, strict=True))


def operation(
    name: str,
    inputs: Callable[[], Inputs],
    ours: Callable[[Inputs], Any],
    plain: Callable[[Inputs], Any],
    moved: float,
    flops: float = 0.0,
) -> Case:
    """A case of another operation, beside its definition in PyTorch."""
    check = partial(compared, ours, plain, rounding=torch.float32)
    sets = min(16, math.ceil(L2 / moved))
    return Case(name, inputs, ours, check, moved, flops, sets, {"torch": lambda x: plain})


def saliency_inputs(heads: int, n_kv: int, keys: int, count: int) -> Inputs:
    """One query row and the gradients of its output for `count` candidates."""
    x = row_inputs(1, heads, n_kv, 1, keys)
    own = torch.tensor([keys - 1], device=DEVICE)
    return x | {"lse": x["lse"][..., 0], "d_out": random(1, count, heads, 128, dtype=torch.float32), "own": own}


def contrast_inputs(batch: int, n: int) -> Inputs:
    """Logits of two branches, with draws."""
    ones = torch.ones(batch, device=DEVICE)
    return {
        "x": 3 * random(batch, n, dtype=torch.float32),
        "y": 3 * random(1, batch, n, dtype=torch.float32),
        "weight": ones[:, None],
        "beta": 0.1 * ones,
        "u": torch.rand(batch, device=DEVICE),
        "top_p": 0.9 * ones,
    }


def contrasted(x: Inputs, draw: bool, plain: bool) -> tuple[Tensor, Tensor]:
    """Tokens and scores, by the kernels or by the definition."""
    kw = {"u": x["u"], "top_p": x["top_p"]} if draw else {}
    with reference_only() if plain else nullcontext():
        return contrast_and_choose(x["x"], x["y"], x["weight"], beta=x["beta"], **kw)


def rotary_inputs(batch: int, heads: int) -> Inputs:
    """Queries and keys of a decoding step with the angles of their positions."""
    angle = torch.rand(batch, 1, 128, device=DEVICE) * 640
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    return {"q": random(batch, heads, 1, 128), "k": random(batch, heads, 1, 128), "cos": cos, "sin": sin}


def rotated(x: Inputs) -> tuple[Tensor, ...]:
    """Rotary position embedding on the kernel."""
    from vlmfix.kernels.rotary import rotary

    return tuple(rotary(**x))


def rotated_plainly(x: Inputs) -> tuple[Tensor, ...]:
    """Rotary position embedding by its definition, which is transformers' own."""
    from vlmfix.kernels.rotary import reference

    return tuple(reference.rotary(**x))


def rotary_case(batch: int, heads: int) -> Case:
    """Rotary position embedding of a decoding step."""
    return operation(
        f"rotary B={batch} {heads}/{heads}",
        partial(rotary_inputs, batch, heads),
        rotated,
        rotated_plainly,
        2 * batch * 128 * (4 * heads + 2),
    )


def saliency_case(heads: int, n_kv: int, keys: int) -> Case:
    """Saliency of five candidates."""
    return operation(
        f"saliency row C=5 {heads}/{n_kv} K={keys}",
        partial(saliency_inputs, heads, n_kv, keys, 5),
        lambda x: tuple(saliency_row(**x)),
        lambda x: tuple(saliency_reference.saliency_row(**x)),
        2 * n_kv * keys * 128 * 2 + 5 * keys * 4,
    )


def rows_case(heads: int, n_kv: int, rows: int, keys: int, reduce: str | None) -> Case:
    """A block of the attention matrix."""
    out = rows * keys * 4 * (1 if reduce else heads)
    return operation(
        f"row block {reduce} {heads}/{n_kv} R={rows} K={keys}",
        partial(row_inputs, 1, heads, n_kv, rows, keys),
        lambda x: row_block(*without_v(x), reduce),
        lambda x: row_reference.row_block(*without_v(x), reduce),
        n_kv * keys * 256 + heads * rows * 256 + out,
        2 * heads * rows * keys * 128,
    )


def contrast_case(batch: int, n: int, draw: bool) -> Case:
    """Contrast of two branches and the choice of a token."""
    return operation(
        f"contrast {'draw' if draw else 'greedy'} B={batch} V={n}",
        partial(contrast_inputs, batch, n),
        partial(contrasted, draw=draw, plain=False),
        partial(contrasted, draw=draw, plain=True),
        3 * batch * n * 4,
    )


OPERATIONS = [
    rows_case(32, 32, 1, 640, "mean"),
    rows_case(28, 4, 32, 640, None),
    operation(
        "column mass 32/32 640",
        partial(row_inputs, 1, 32, 32, 640, 640),
        lambda x: column_mass(*without_v(x), "mean"),
        lambda x: row_reference.column_mass(*without_v(x), "mean"),
        2 * 32 * 640 * 256,
        2 * 32 * 640 * 640 * 128,
    ),
    saliency_case(32, 32, 640),
    saliency_case(28, 4, 4096),
    contrast_case(1, 32064, False),
    contrast_case(1, 152064, False),
    contrast_case(1, 152064, True),
    contrast_case(16, 32064, True),
    rotary_case(1, 32),
    rotary_case(16, 32),
    operation(
        "kv compact B=8 32 heads 1024 of 4096",
        lambda: row_inputs(8, 32, 32, 1, 4096) | {"keep": torch.rand(8, 4096, device=DEVICE).argsort(1)[:, :1024]},
        lambda x: kv_compact(x["k"], x["v"], x["keep"]),
        lambda x: compact_reference.kv_compact(x["k"], x["v"], x["keep"]),
        4 * 8 * 32 * 1024 * 256,
    ),
]
"""All but grouped attention and thin products."""
