"""`search` from end to end: verified plans, replay, resuming after SIGKILL at any moment, one plan for all chunk sizes."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import smpq_ext
from python_tests.test_methods import BITS, BUDGET, Net, net, samples
from smpq_ext.core import Result, SmpqError
from smpq_ext.engine import evaluator as engine

__all__ = ["net"]


def run(net: Net, **settings: object) -> Result:
    given: dict[str, object] = {"bits": BITS, "budget": BUDGET, "evaluations": 250, "loss": "kl"}
    return smpq_ext.search(net, [samples(96, 1)], **{**given, **settings})


def test_a_result_tells_what_was_done(net: Net, tmp_path: Path) -> None:
    result = run(net)
    assert result.cost["weight-bits"] <= 3 and result.cost["activation-bits"] <= 3
    assert result.plan.bits["stem.weight"] == result.plan.bits["head.activation"] == 8
    assert set(result.seconds) == {"calibrate", "search", "verify"} and result.peak_bytes > 0
    assert 0 < result.evaluations <= 250
    again = smpq_ext.apply(net, result.plan)
    x, y = samples(96, 1)
    value = engine.evaluator(net, [(x, y)], bits=BITS, loss="kl").loss_of(again)
    assert value == pytest.approx(result.measured_loss, rel=1e-6)
    result.save(tmp_path)
    loaded = Result.load(tmp_path)
    assert loaded.plan.to_json() == result.plan.to_json() and loaded.cost == dict(result.cost)
    assert np.array_equal(loaded.scores, result.scores) and loaded.space == result.space
    assert torch.equal(smpq_ext.apply(net, loaded.plan)(x), again(x))


def test_the_same_seed_gives_the_same_plan_and_a_store_answers_the_second_time(net: Net, tmp_path: Path) -> None:
    first = run(net, store=tmp_path / "evaluations.sqlite")
    count = _rows(tmp_path / "evaluations.sqlite")
    second = run(net, store=tmp_path / "evaluations.sqlite")
    third = run(net)
    assert first.plan.to_json() == second.plan.to_json() == third.plan.to_json()
    assert first.evaluations == second.evaluations
    assert _rows(tmp_path / "evaluations.sqlite") == count


def _rows(path: Path) -> int:
    with sqlite3.connect(path) as database:
        (table,) = database.execute("SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'eval%'").fetchone()
        return int(database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.mark.parametrize("renormalize", [True, False])
def test_chunk_sizes_do_not_change_the_plan(net: Net, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for memory in (1 << 18, 1 << 24):
        made = engine.evaluator
        monkeypatch.setattr(
            "smpq_ext.driver.make_evaluator", lambda *a, memory=memory, **k: made(*a, memory=memory, **k)
        )
        plans.append(run(net, renormalize=renormalize).plan.bits)
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_killed_twenty_times_it_goes_on_and_repeats_at_most_one_batch_each(net: Net, tmp_path: Path) -> None:
    """A child runs the search with a store; it is killed at random moments, and the last one may finish."""
    expected = run(net).plan.to_json()
    torch.set_num_threads(1)  # a forked child has no other threads
    log, store = tmp_path / "rows", tmp_path / "evaluations.sqlite"
    by_group, largest = engine.TorchEvaluator.by_group, [0]

    def logged(self: engine.TorchEvaluator, rows: np.ndarray) -> np.ndarray:
        with log.open("a") as file:
            file.write(f"{len(rows)}\n")
        return by_group(self, rows)

    def child() -> int:
        pid = os.fork()
        if pid == 0:
            engine.TorchEvaluator.by_group = logged
            try:
                result = run(net, store=store)
                (tmp_path / "plan").write_text(repr(result.plan.to_json()))
                os._exit(0)
            except BaseException:
                os._exit(1)
        return pid

    start = time.perf_counter()
    os.waitpid(child(), 0)
    whole = time.perf_counter() - start
    distinct = sum(int(line) for line in log.read_text().split())
    largest = max(int(line) for line in log.read_text().split())
    for file in tmp_path.iterdir():
        file.unlink()

    rng, kills = np.random.default_rng(0), 0
    for _ in range(60):
        pid = child()
        time.sleep(rng.uniform(0.1, 0.6) * whole)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        if kills >= 20:
            break
    pid = child()
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "plan").read_text() == repr(expected)
    computed = sum(int(line) for line in log.read_text().split())
    assert computed <= distinct + kills * largest
    assert kills >= 20


def test_bad_arguments_are_refused_before_anything_is_computed(net: Net, tmp_path: Path) -> None:
    for settings, message in (
        ({"budget": "weight-bits=0"}, "budget"),
        ({"budget": "parsecs=12"}, "budget"),
        ({"method": "magic"}, "method: 'magic' is not known; there are"),
        ({"bits": (2, 17)}, "bits"),
        ({"evaluations": 0}, "evaluations"),
        ({"loss": "best"}, "loss"),
        ({"fixed": {"nowhere": 8}}, "fixed"),
        ({"store": tmp_path}, "store"),
    ):
        with pytest.raises(SmpqError, match=message):
            run(net, **settings)
