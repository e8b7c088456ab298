"""One binary serves every x86-64 processor: the kernels of the lower instruction sets hold what the best ones hold."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.slow]
FILES = ("test_ops.py", "test_fused_ops.py", "test_fused.py", "test_attention.py")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one level elsewhere")
@pytest.mark.parametrize("level", ["avx2", "baseline"])
def test_the_kernels_equal_their_twins_at_every_level(level: str) -> None:
    here = Path(__file__).parent
    env = {**os.environ, "SMPQ_ISA": level, "PYTHONPATH": str(here.parent)}
    told = subprocess.run(
        [sys.executable, "-c", "from smpq_ext import _C; print(_C.build_info())"],
        env=env, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert level in told
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    run = subprocess.run(
        [*command, *(str(here / name) for name in FILES)],
        check=False, env=env, cwd=here.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
