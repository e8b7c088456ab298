"""Several processes search as one: the same plan, the same store, errors on all ranks, and no evaluation lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smpq_ext.distributed import learned, shares

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo")


@given(rows=st.integers(0, 500), rates=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9))
def test_every_row_has_one_rank_and_nobody_waits_longer_than_a_row_takes(rows: int, rates: list[float]) -> None:
    rate = np.array(rates)
    edges = np.array(shares(rows, rate))
    counts = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == rows and (counts >= 0).all()
    assert (np.abs(counts - rows * rate / rate.sum()) < 1 + 1e-6).all()


@given(rates=st.lists(st.floats(0.1, 10), min_size=2, max_size=9), rows=st.integers(2, 40))
def test_a_rank_that_was_slow_once_gets_rows_again(rates: list[float], rows: int) -> None:
    true, known, recent = np.array(rates), np.ones(len(rates)), np.zeros(len(rates), np.bool_)
    for batch in range(400):
        had = np.diff(shares(rows, known)) > 0
        measured = np.where(had, true, 0.0)
        if batch == 0:
            measured[0] *= 1e-4
        known = learned(known, measured)
        assert (known > 0).all() and known.mean() == pytest.approx(1)
        recent = had if batch % 100 == 0 else recent | had
    assert recent.all()


def test_rates_become_those_that_are_measured() -> None:
    true, known = np.array([1.0, 2.0, 5.0]), np.ones(3)
    for _ in range(30):
        known = learned(known, true * (np.diff(shares(100, known)) > 0))
    np.testing.assert_allclose(known, true / true.mean(), rtol=1e-6)


def launch(ranks: int, *command: str, **variables: str) -> subprocess.Popen[str]:
    """A command under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", **variables}
    return subprocess.Popen(
        [*torchrun, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=150)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def outcome(ranks: int, task: str, folder: Path, *options: str, **variables: str) -> list[dict]:
    """What each rank of python_tests/ranks.py wrote."""
    process = launch(ranks, *options, str(HERE / "ranks.py"), task, str(folder), **variables)
    said, errors = finish(process)
    assert process.returncode == 0, said + errors
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(ranks)]


def evaluations(folder: Path) -> dict[tuple[str, bytes], bytes]:
    with sqlite3.connect(folder / "evaluations.sqlite") as database:
        rows = database.execute("SELECT study, key, groups FROM evaluations WHERE length(study) = 64")
        return {(study, key): groups for study, key, groups in rows}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("alone")
    (found,) = outcome(1, "search", folder)
    return found, evaluations(folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_plan_and_every_evaluation_are_those_of_one_process(ranks: int, alone: tuple, tmp_path: Path) -> None:
    found = outcome(ranks, "search", tmp_path)
    assert [f["plan"] for f in found] == ranks * [alone[0]["plan"]]
    assert evaluations(tmp_path) == alone[1]
    rows = [f["rows"] for f in found]
    assert sum(rows) == len(alone[1]) and min(rows) > 0  # each computed by one rank, and each rank some


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    found = outcome(2, "errors", tmp_path)
    for rank in found:
        assert rank["failing"] == "rank 1: RuntimeError('this rank is ill')"
        assert "rank 1 asks for other rows than rank 0" in rank["apart"]
        assert "rank 1 has another study than rank 0" in rank["other study"]
        assert "cannot use" in rank["store"]


@pytest.mark.slow
def test_killed_ranks_cost_at_most_a_batch_each(alone: tuple, tmp_path: Path) -> None:
    """SMPQ_KILLS: so many ranks are killed at least, in as many searches as that takes."""
    kills = 0
    for seed in itertools.count(1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found = outcome(2, "search", folder, "--max-restarts", "15", KILLS=f"{seed} 12")
        assert [f["plan"] for f in found] == 2 * [alone[0]["plan"]]
        assert evaluations(folder) == alone[1]
        logs = [[int(n) for n in (folder / f"rows{r}").read_text().split()] for r in range(2)]
        assert sum(map(sum, logs)) <= len(alone[1]) + found[0]["attempt"] * sum(map(max, logs))
        assert found[0]["attempt"] > 0
        kills += found[0]["attempt"]
        print(f"search {seed}: {found[0]['attempt']} kills")
        if kills >= int(os.environ.get("SMPQ_KILLS", "5")):
            return


NET = """
import torch

def build():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers)
"""


@pytest.mark.slow
def test_the_command_line_says_things_once_and_finds_the_plan_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 6)).astype(np.float32), y=rng.integers(0, 4, 64))
    command = ["-m", "smpq_ext.cli", "search", f"--model={tmp_path}/net.py:build", f"--data={tmp_path}/data.npz"]
    command += ["--budget=weight-bits=4", "--fixed=none", "--bits=2,4,8"]
    plans = []
    for ranks in (1, 2):
        process = launch(ranks, *command, f"--out={tmp_path}/{ranks}")
        said, errors = finish(process)
        assert process.returncode == 0, said + errors
        assert said.count("slots, at most") == said.count("report:") == 1
        plans.append((tmp_path / str(ranks) / "plan.json").read_text())
    assert plans[0] == plans[1] and evaluations(tmp_path / "1") == evaluations(tmp_path / "2")
    process = launch(2, *command[:-3], "--budget=weight-bits=1", f"--out={tmp_path}/none")
    said, errors = finish(process)
    assert process.returncode == 1 and "smpq: budget: weight-bits=1" in errors and "Traceback" not in said
