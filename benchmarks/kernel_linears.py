"""Cases of `benchmarks/kernels.py`: products of a few rows with weight matrices, beside the vendor's library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.kernel_cases import Case, Inputs, random
from benchmarks.kernel_operations import operation

PREFIX = "linear "
"""How the names of these cases begin."""


def inputs(m: int, k: int, sizes: Sequence[int], biased: bool) -> Inputs:
    """Rows and weights whose products are of order one."""
    weights = [random(n, k).mul_(k**-0.5) for n in sizes]
    return {"x": random(m, k), "weights": weights, "biases": [random(n) if biased else None for n in sizes]}


def ours(x: Inputs, gated: bool) -> tuple[Tensor, ...]:
    """On the kernels."""
    from vlmfix.kernels.linear import gated_linear, linears

    if gated:
        return (gated_linear(x["x"], *x["weights"]),)
    return tuple(linears(x["x"], x["weights"], x["biases"]))


def plain(x: Inputs, gated: bool) -> tuple[Tensor, ...]:
    """One product of torch per weight."""
    out = tuple(linear(x["x"], *layer) for layer in zip(x["weights"], x["biases"], strict=True))
    return (silu(out[0]) * out[1],) if gated else out


def linear_case(name: str, m: int, k: int, sizes: Sequence[int], biased: bool = False, gated: bool = False) -> Case:
    """A case of thin products; ideal bytes are the weights'."""
    count = sum(sizes) * k
    return operation(
        f"{PREFIX}{name} M={m}",
        partial(inputs, m, k, sizes, biased),
        partial(ours, gated=gated),
        partial(plain, gated=gated),
        count * torch.bfloat16.itemsize,
        2 * m * count,
    )


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("q/k/v 3 x 4096x4096", {"k": 4096, "sizes": (4096, 4096, 4096)}),
    ("q/k/v 3584+512+512x3584", {"k": 3584, "sizes": (3584, 512, 512), "biased": True}),
    ("gated 2 x 11008x4096", {"k": 4096, "sizes": (11008, 11008), "gated": True}),
    ("gated 2 x 18944x3584", {"k": 3584, "sizes": (18944, 18944), "gated": True}),
    *(
        (f"{n}x{k}", {"k": k, "sizes": (n,)})
        for n, k in ((4096, 4096), (4096, 11008), (3584, 3584), (3584, 18944), (32064, 4096), (152064, 3584))
    ),
]
"""Layers of LLaVA 7B (hidden 4096) and Qwen2.5-VL 7B (hidden 3584), output features first."""


def pulled(x: Inputs, fused: bool) -> tuple[Tensor, ...]:
    """What rows of gradients send back through the weights: on the kernels, or one product of torch per weight."""
    from vlmfix.kernels.linear import linears_gradient

    grads = x["grads"]
    if fused:
        return (linears_gradient(grads, x["weights"]),)
    out = torch.mm(grads[0], x["weights"][0])
    for grad, weight in zip(grads[1:], x["weights"][1:], strict=True):
        out.addmm_(grad, weight)
    return (out,)


def gradient_inputs(m: int, k: int, sizes: Sequence[int]) -> Inputs:
    """Gradients of all layers' results, and the weights."""
    return {"grads": [random(m, n) for n in sizes], "weights": [random(n, k).mul_(n**-0.5) for n in sizes]}


def gradient_case(name: str, m: int, k: int, sizes: Sequence[int], **_: bool) -> Case:
    """A case of gradients through thin products; ideal bytes are the weights'."""
    count = sum(sizes) * k
    ours, torchs = (partial(pulled, fused=fused) for fused in (True, False))
    data, size = partial(gradient_inputs, m, k, sizes), count * torch.bfloat16.itemsize
    return operation(f"{PREFIX}gradient {name} M={m}", data, ours, torchs, size, 2 * m * count)


LINEARS = [linear_case(name, m, **layer) for name, layer in LAYERS for m in (1, 2, 16, 32)]
"""Products of a few rows."""

GRADIENTS = [gradient_case(name, 5, **layer) for name, layer in LAYERS[:6]]
"""Gradients of five candidates through the layers of LLaVA, and of Qwen up to its attention."""
