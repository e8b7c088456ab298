"""The benchmarks still run: every side once, untimed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import smpq_ext
from benchmarks import coverage
from benchmarks.gpu import engine, ops
from python_tests.random_models import build
from smpq_ext.estimators.control import aumann_shapley

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("kind", coverage.GAMES)
def test_the_games_of_coverage_are_what_they_tell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivatives that are not off integrate to the Shapley values, and the parts' mean is the game."""
    monkeypatch.setattr(coverage, "OFF", 0.0)
    game = coverage.game_of(kind, "passes, parts", 6, seed=1)
    exact = coverage.attribution("exact", game, 2**6, 0).values
    np.testing.assert_allclose(aumann_shapley(game.derivatives, 8), exact, atol=1e-12)
    rows = np.random.default_rng(0).random((9, 6)) < 0.5
    for most in (1, 3, 8, 20):
        parts = game.parts(most)
        assert len(parts) == min(most, coverage.GROUPS)
        np.testing.assert_allclose(sum(share * part(rows) for share, part in parts), game(rows), atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself
def test_the_gpu_benchmark_computes_what_its_baselines_do() -> None:
    cases = [ops.fake_quantize(1 << 12, torch.float32, per_channel, CPU) for per_channel in (False, True)]
    cases += [ops.coalition(1 << 12, 3, mixed, torch.bfloat16, CPU) for mixed in (False, True)]
    cases.append(ops.weights(build("Branches", 0)[0], 2, CPU))
    assert all(row["µs"] > 0 and row["of copy"] > 0 for row in cases)
    model, data = build("Branches", 0, sizes=(8,))
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 4, 6, 8), fixed={}, renormalize=False)
    for game in engine.GAMES:
        row = engine.measure(ev, game, {"vs B2": 1e-6}, 1e12)
        assert row["coalitions/s"] > 0 and row["met"]


def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "benchmarks.gpu: torch finds no GPU here\n"
