"""What all tests share: one thread, no network, no files outside temporary folders, the wide matrix only on demand."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="vlmfix-tests-")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the wide matrix out unless `-m` asks for it, and tests that need a GPU where there is none."""
    asked = config.option.markexpr
    left_out = [item for item in items if _left_out(item, asked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _left_out(item: pytest.Item, asked: str) -> bool:
    wide = item.get_closest_marker("wide") is not None and "wide" not in asked
    gpu = item.get_closest_marker("gpu") is not None and not torch.cuda.is_available()
    return wide or gpu
