"""Nested data as one list of tensors and a description of everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


def overwrite(mine: Any, theirs: Any) -> bool:
    """Copies every tensor of one structure into another at its address.

    Args:
        mine: dataclasses, dictionaries, tuples, tensors and plain values.
        theirs: what it becomes.

    Returns:
        False, and nothing is changed, where the two differ in more than the tensors' values.
    """
    old: list[Tensor] = []
    new: list[Tensor] = []
    if _shape(mine, old) != _shape(theirs, new):
        return False
    for target, value in zip(old, new, strict=True):
        if target is not value:
            target.copy_(value)
    return True


def _shape(value: Any, found: list[Tensor]) -> Hashable:
    """What a structure consists of besides the values of its tensors, which are added to `found`."""
    if isinstance(value, Tensor):
        found.append(value)
        return torch.Size, tuple(value.shape), value.dtype, value.device
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = ((f.name, _shape(getattr(value, f.name), found)) for f in dataclasses.fields(value))
        return type(value), tuple(parts)
    if isinstance(value, dict):
        return dict, tuple((key, _shape(item, found)) for key, item in sorted(value.items(), key=lambda x: repr(x[0])))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_shape(item, found) for item in value)
    if value is None or isinstance(value, (bool, int, float, str, frozenset)):
        return value
    return object, id(value)
