"""A decoder's layers in fewer launches, for as long as a step is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from vlmfix.hf.parts import Parts
from vlmfix.kernels.linear import gated_linear, linears
from vlmfix.kernels.rms_norm import rms_norm
from vlmfix.kernels.rotary import rotary
from vlmfix.kernels.silu_mul import silu_mul

Forward = Callable[..., Any]

ROTARY = "apply_rotary_pos_emb"
"""Name under which attention layers of transformers find the rotary embedding."""

NORMED, GATED = (1.0, 1e-3), (1.0, 4.0)
"""Sizes of the numbers that norms and gated layers are tried with: where eps shows, where a gate is clamped or bent."""


class Fused:
    """Fused forms of those modules of a decoder whose results they are found to equal.

    Linear layers are known by their type; whether other modules are what their parts suggest is tried out on random
    numbers, since classes of one name differ in details.

    Args:
        parts: the model.
    """

    def __init__(self, parts: Parts) -> None:
        self.products: dict[nn.Module, Forward] = {}
        self.others: dict[nn.Module, Forward] = {}
        self._shared: list[_Shared] = []
        for module in parts.decoder.modules():
            if not _untouched(module):
                continue
            projections = _projections(module)
            if projections:
                self._shared.append(_Shared(projections))
                self.products |= {layer: self._shared[-1].forward(i) for i, layer in enumerate(projections)}
            for find, found in ((_linear, self.products), (_gated, self.products), (_norm, self.others)):
                form = find(module)
                if form is not None:
                    found.setdefault(module, form)
            rotated = _rotated(module)
            if rotated is not None:
                self.others[module] = rotated

    @property
    def forwards(self) -> dict[nn.Module, Forward]:
        """All modules that have another form."""
        return self.products | self.others

    @contextlib.contextmanager
    def applied(self, products: bool = False) -> Iterator[None]:
        """Within the block these modules run in their fused form.

        Args:
            products: only products with weights, which compilers leave to libraries.
        """
        chosen = self.products if products else self.forwards
        modules: dict[Any, Forward] = {module: form for module, form in chosen.items() if _untouched(module)}
        try:
            for module, forward in modules.items():
                module.forward = forward
            yield
            for shared in self._shared:
                shared.judge()
        finally:
            for module in modules:
                vars(module).pop("forward", None)
            for shared in self._shared:
                shared.forget()


class _Shared:
    """Layers with one input, computed together when the first of them is called.

    Should they turn out to be called with different inputs, they run one by one from then on.

    Args:
        layers: the layers.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers, self._apart = layers, False
        self._x: Tensor | None = None
        self._left: dict[int, Tensor] = {}

    def judge(self) -> None:
        """Takes results that nobody asked for in a whole step as a sign that the layers are not used together."""
        self._apart = self._apart or bool(self._left)

    def forget(self) -> None:
        """Drops results that nobody asked for, as after an error."""
        self._x, self._left = None, {}

    def forward(self, at: int) -> Forward:
        """The forward of one layer."""

        def forward(x: Tensor) -> Tensor:
            if self._left and (at not in self._left or self._x is not x):
                self._apart, self._left = True, {}
            if self._apart:
                return _products(self._layers[at : at + 1], x)[0]
            if not self._left:
                self._x, self._left = x, dict(enumerate(_products(self._layers, x)))
            out = self._left.pop(at)
            if not self._left:
                self._x = None
            return out

        return forward


def _products(layers: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    return linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


def _projections(module: nn.Module) -> list[nn.Linear]:
    """An attention layer's projections, if all are plain and could have one input."""
    layers = [getattr(module, f"{name}_proj", None) for name in "qkv"]
    found = [layer for layer in layers if layer is not None and _exact(layer)]
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in found}
    return found if len(found) == len(layers) and len(kinds) == 1 else []


def _linear(module: nn.Module) -> Forward | None:
    if not _exact(module):
        return None
    layer = [module]
    return lambda x: _products(layer, x)[0]


def _gated(module: nn.Module) -> Forward | None:
    """Fused form of what could be a layer gated by silu."""
    layers: tuple[Any, ...] = tuple(getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    gate, up, down = layers
    whole = all(_exact(layer) and layer.bias is None and not _hooked(layer) for layer in (gate, up))

    def forward(x: Tensor) -> Tensor:
        inner = gated_linear(x, gate.weight, up.weight) if whole else silu_mul(gate(x), up(x))
        out: Tensor = down(inner)
        return out

    return forward if _equal(module, forward, gate.in_features, gate.weight, GATED) else None


def _norm(module: nn.Module) -> Forward | None:
    """Fused form of what could be a root-mean-square norm."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, module.weight, eps)  # type: ignore[arg-type]

    return forward if _equal(module, forward, weight.shape[0], weight, NORMED) else None


def _rotated(module: nn.Module) -> Forward | None:
    """An attention layer's own forward with another function for the rotary embedding."""
    plain = type(module).forward
    code = getattr(plain, "__code__", None)
    weight = next(module.parameters(recurse=True), None)
    if code is None or ROTARY not in code.co_names or weight is None or not weight.is_floating_point():
        return None
    theirs: Any = plain.__globals__.get(ROTARY)
    sizes = ((1, 2, 1, 32), (1, 1, 1, 32), (1, 1, 32), (1, 1, 32))
    generator = torch.Generator().manual_seed(0)
    trial = [torch.randn(size, generator=generator).to(weight.device, weight.dtype) for size in sizes]

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or q.dtype != cos.dtype or (cos.dim(), cos.shape[-1]) != (3, q.shape[-1]):  # not as tried
            return theirs(q, k, cos, sin, *rest, **named)
        return rotary(q, k, cos, sin)

    if weight.is_meta or not _alike(theirs, ours, *trial):
        return None
    names = {**plain.__globals__, ROTARY: ours}
    function = FunctionType(code, names, plain.__name__, plain.__defaults__, plain.__closure__)
    function.__kwdefaults__ = plain.__kwdefaults__
    forward: Forward = function.__get__(module)
    return forward


def _untouched(module: nn.Module) -> bool:
    """Whether nobody else changed a module's forward; hooks run around whichever it has."""
    return "forward" not in vars(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _exact(layer: Any) -> TypeGuard[nn.Linear]:
    """Whether a layer is a product with a weight that lies in memory, and nothing else."""
    if type(layer) is not nn.Linear or not _untouched(layer):
        return False
    weight = layer.weight
    return type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta


def _equal(module: nn.Module, forward: Forward, width: int, like: Tensor, sizes: Sequence[float]) -> bool:
    """Whether both forms of a module give the same for random numbers [1, sizes, width], whose mean is not zero."""
    if not like.is_floating_point() or like.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, len(sizes), width, generator=generator) + 1) * torch.tensor(sizes)[:, None]
    return _alike(module.forward, forward, x.to(like.device, like.dtype))


@torch.no_grad()
def _alike(theirs: Any, ours: Forward, *inputs: Tensor) -> bool:
    """Whether both give the same up to a rounding or two of each row's largest number."""
    try:
        want, got = (out if isinstance(out, tuple) else (out,) for out in (theirs(*inputs), ours(*inputs)))
    except Exception:  # something else, which takes other arguments
        return False
    return len(want) == len(got) and all(_close(x, y) for x, y in zip(want, got, strict=True))


def _close(want: Any, got: Tensor) -> bool:
    if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    error, scale = (x.abs().amax(-1) for x in (want - got, want))
    return bool((error <= 4 * torch.finfo(want.dtype).eps * scale).all())
