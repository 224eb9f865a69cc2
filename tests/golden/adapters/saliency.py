"""The vectors of the saliency paper: SGRS and its metric, and LocoRE's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from . import locore, sgrs

MUTANTS: dict[str, Any] = {}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    method = locore if "first_generated_position" in case["hyper"] else sgrs
    method.check(case, arrays, folder)
