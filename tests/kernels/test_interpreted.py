"""Runs this folder's kernel tests in a process of their own, in Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmfix.kernels import dispatch


@pytest.mark.skipif(dispatch.INTERPRETED, reason="this is the inner process")
@pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed here")
def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", str(here), "-m", "interpreted and not gpu", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout[-500:]
    assert int(passed.group(1)) >= 250, run.stdout[-500:]
