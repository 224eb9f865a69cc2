"""Which form of an operation runs: the one place that decides between Triton and PyTorch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run in Triton's CPU interpreter; fixed when the process starts."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Element types that the kernels take; any other runs in PyTorch."""

launches: Counter[str] = Counter()
"""Kernel launches by name: the proof that a test or benchmark ran the Triton form."""

_forced = 0

_INSTALLED = find_spec("triton") is not None


@contextmanager
def reference_only() -> Iterator[None]:
    """Within the block every operation runs in its PyTorch form, in all threads."""
    global _forced  # compilers guard on a global, and see no context variable
    _forced += 1
    try:
        yield
    finally:
        _forced -= 1


def use_triton(*tensors: Tensor) -> bool:
    """Whether the Triton form serves these inputs: on the current GPU (or interpreted), supported types, no gradients.

    Models that are spread over several GPUs run in PyTorch where their layers are not on the first one.
    """
    if not (INTERPRETED or all(x.is_cuda for x in tensors)) or any(x.dtype not in DTYPES for x in tensors):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):  # kernels have no backward
        return False
    if not INTERPRETED and not torch.compiler.is_compiling():
        current = torch.cuda.current_device()  # Triton launches there, wherever tensors lie
        if any(x.device.index != current for x in tensors):
            return False
    return has_triton() and not _forced


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block kernels are launched on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_triton() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


@cache
def multiprocessors(index: int | None) -> int:
    """Multiprocessors of a CUDA device; 3 where there is none, so that interpreted runs exercise several splits."""
    if INTERPRETED or not torch.cuda.is_available():
        return 3
    return torch.cuda.get_device_properties(index or 0).multi_processor_count


@cache
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a program may use on a CUDA device; 64 KiB where there is none."""
    if INTERPRETED or not torch.cuda.is_available():
        return 2**16
    properties: Any = torch.cuda.get_device_properties(index or 0)
    return int(properties.shared_memory_per_block_optin)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: exact products for float32, tensor cores otherwise."""
    return "ieee" if dtype == torch.float32 else "tf32"


def must_cast(dtype: torch.dtype) -> bool:
    """Whether loads are widened to float32: the interpreter's bfloat16 arithmetic is wrong."""
    return INTERPRETED and dtype == torch.bfloat16


def power_of_two(n: int, least: int = 1) -> int:
    """Smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length()) if n > 1 else max(least, 1)


def ceil_div(a: int, b: int) -> int:
    """The quotient a / b rounded up; `triton.cdiv` costs the host ten times as long."""
    return -(-a // b)


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def operation(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of tensors a custom operation where torch must see one, and leaves it a plain call elsewhere.

    torch.compile and autograd get the operation `vlmfix::name`, the former to keep it in one graph, the latter to
    refuse a backward pass. The dispatcher costs more host time than a small kernel takes, so eager inference goes
    without it. The result's `register_fake` is the operation's.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"vlmfix::{name}", function, mutates_args=())

        @wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or torch.is_grad_enabled():
                return op(*args)
            return function(*args)

        call.register_fake = op.register_fake  # type: ignore[attr-defined]
        return call

    return decorate
