"""Kernel tests run on a GPU or in Triton's interpreter, which must be chosen before the kernels are imported.

In an ordinary session the tests of the interpreter are left to `test_interpreted`, which runs them in a process of its
own.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.tools import Place
from vlmfix.kernels import dispatch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [i for i in items if i.get_closest_marker("interpreted") is not None and not dispatch.INTERPRETED]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in set(elsewhere)]


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where the test runs; outputs are filled with NaN before any kernel writes them."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
    torch.manual_seed(0)
    return Place(request.param)


def _poisoned(make):
    def poisoned(*args, **kwargs):
        out = make(*args, **kwargs)
        if out.requires_grad:  # not ours: torch.compile's own trials
            return out
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-7) if out.dtype != torch.bool else out

    return poisoned
