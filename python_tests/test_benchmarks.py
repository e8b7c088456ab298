"""The benchmarks still run: every side once, untimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("name", ["bench_ops", "bench_layers", "bench_engine_scaling"])
def test_benchmarks_run(name: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"benchmarks/{name}.py",
        "--benchmark-disable",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
