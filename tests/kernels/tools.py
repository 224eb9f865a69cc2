"""Shared by the kernel tests: where they run, the error budget, the proof that a kernel ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfix.kernels import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Place:
    """A device, and sizes that suit it: small in the interpreter, real ones on a GPU."""

    device: str

    def __call__(self, small: int, large: int) -> int:
        return large if self.device == "cuda" else small

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape).to(dtype).to(self.device)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape).to(self.device)

    def tensor(self, values: object, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def arange(self, *args: int) -> Tensor:
        return torch.arange(*args, device=self.device)

    def randint(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape).to(self.device)


@contextmanager
def launching(*names: str) -> Iterator[None]:
    """Fails unless each of the named kernels is launched within the block."""
    before = dispatch.launches.copy()
    yield
    still = [name for name in names if dispatch.launches[name] == before[name]]
    assert not still, f"not launched: {still}"


def within_budget(actual: Tensor, plain: Tensor, exact: Tensor, rounding: torch.dtype) -> None:
    """Error at most twice that of the PyTorch form in the same element type plus one rounding, against float64."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    assert torch.equal(actual.isinf(), exact.isinf())
    actual, plain, exact = (torch.where(exact.isinf(), 0.0, t.double()) for t in (actual, plain, exact))
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(rounding).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= allowed
