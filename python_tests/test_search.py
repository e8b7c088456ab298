"""`search` from end to end: verified plans, replay, resuming after SIGKILL at any moment, any chunk size."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import BITS, BUDGET, Net, net, samples

import smpq_ext
from smpq_ext import driver
from smpq_ext.core import Result, SmpqError, TooFew
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


def test_a_store_of_another_study_is_not_used_and_told_what_differs(
    net: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "evaluations.sqlite"
    cheap = functools.partial(run, method="uniform", store=path)
    cheap(net)
    cheap(net, seed=1)
    assert "another study" not in caplog.text
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.norms[0].running_mean += 0.1
    stale = cheap(other)
    assert "another study and not used; these differ: grids, weights" in caplog.text
    assert stale.plan.to_json() == run(other, method="uniform").plan.to_json()
    assert stale.measured_loss == run(other, method="uniform").measured_loss
    caplog.clear()
    cheap(other, renormalize=False)
    assert "these differ: options\n" in caplog.text
    caplog.clear()
    cheap(net)
    assert "another study" not in caplog.text


def test_seconds_become_evaluations_once(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = iter([0.01, 5.0])
    monkeypatch.setattr(driver.Study, "seconds_per_evaluation", property(lambda self: next(pace)))
    timed = functools.partial(run, net, evaluations=None, seconds=2.5, store=tmp_path / "evaluations.sqlite")
    first, again = timed(), timed()
    assert first.plan.to_json() == again.plan.to_json() and first.evaluations == again.evaluations <= 250
    assert next(pace) == 5.0  # the second search did not measure
    assert first.plan.to_json() == run(net, evaluations=250).plan.to_json()
    monkeypatch.setattr(driver.Study, "seconds_per_evaluation", 1.0)
    with pytest.raises(TooFew, match=r"seconds: 3\.5 pay for 3; evaluations: 3 are too few"):
        run(net, evaluations=None, seconds=3.5)
    with pytest.raises(SmpqError, match="seconds: give this or evaluations"):
        run(net, seconds=1)
    for wrong in (0, -1, float("inf"), float("nan"), "10min"):
        with pytest.raises(SmpqError, match="seconds: a positive number"):
            run(net, evaluations=None, seconds=wrong)


def _rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        (table,) = database.execute(
            "SELECT name FROM sqlite_master WHERE type='table' AND name LIKE 'eval%'"
        ).fetchone()
        return int(database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.mark.parametrize("renormalize", [True, False])
def test_chunk_sizes_do_not_change_the_plan(net: Net, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for memory in (1 << 18, 1 << 24):
        made = functools.partial(engine.evaluator, memory=memory)
        monkeypatch.setattr("smpq_ext.driver.make_evaluator", made)
        plans.append(run(net, renormalize=renormalize).plan.bits)
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_killed_at_a_hundred_moments_it_goes_on_and_loses_nothing_reported(tmp_path: Path) -> None:
    """Searches with a store, each killed at random moments of its life until it finishes, until 100 kills have hit."""
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, root / "python_tests" / "killable.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as server:

        def killed(folder: Path, seconds: float = 0) -> bool:
            """Whether a search was killed so many seconds after its start; otherwise it finished."""
            server.stdin.write(f"{folder} {seconds}\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            assert status in (0, signal.SIGKILL)
            return status != 0

        for whole in (tmp_path / "first", tmp_path / "whole"):  # before the first the server has to start
            whole.mkdir()
            start = time.perf_counter()
            assert not killed(whole)
            life = time.perf_counter() - start
        rng, hits = np.random.default_rng(0), 0
        for search in itertools.count(1):
            if hits >= 100:
                break
            assert search <= 100, f"only {hits} kills have hit"
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            while killed(folder, rng.uniform(0.01, life)):
                hits += 1
            assert (folder / "plan").read_text() == (whole / "plan").read_text()
            assert _evaluations(folder) == _evaluations(whole)
            reported = (folder / "reported").read_text().splitlines()
            assert len(set(reported)) == len(reported)  # nothing was computed again
            assert set(reported) <= {f"{study} {key.hex()}" for study, key in _evaluations(folder)}


@pytest.mark.slow
def test_two_searches_with_one_store_at_once_find_what_one_finds(tmp_path: Path) -> None:
    script = "import pathlib, sys, torch; torch.set_num_threads(1); import killable, test_methods; "
    script += "r = killable.search(test_methods.trained(), pathlib.Path(sys.argv[1])); print(r.plan.to_json())"
    room = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{room}{os.pathsep}{room.parent}"}

    def start(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", script, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    both = [start(tmp_path / "both"), start(tmp_path / "both")]
    plans = [process.communicate()[0] for process in (*both, start(tmp_path / "one"))]
    assert plans[0] == plans[1] == plans[2] != ""
    assert _evaluations(tmp_path / "both") == _evaluations(tmp_path / "one")


def _evaluations(folder: Path) -> dict[tuple[str, bytes], bytes]:
    with closing(sqlite3.connect(folder / "evaluations.sqlite")) as database:
        return {(s, k): g for s, k, g in database.execute("SELECT study, key, groups FROM evaluations")}


class Normalised(torch.nn.Module):
    """NaN where a layer gives nothing but zeros, as this one's does at 2 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.last = (torch.nn.Linear(8, n) for n in (8, 8, 4))
        with torch.no_grad():
            self.first.weight[0] = self.first.bias[0] = 0
            self.small.weight.mul_(0.3)[:, 0] = 1  # a large weight for an input that is always 0
            self.small.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.small(self.first(x).relu())
        return self.last(x / x.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("method", ["single", "shapley"])
def test_a_loss_that_is_not_finite_stops_the_search_and_names_layer_and_width(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = Normalised(), [(torch.randn(64, 8), torch.randint(0, 4, (64,)))]
    settings = {"bits": (2, 4, 8), "activation_bits": (), "evaluations": 200, "store": tmp_path / "store.sqlite"}
    search = functools.partial(smpq_ext.search, net, data, budget="weight-bits=5", method=method, **settings)
    for _ in range(2):  # it is not in the store as a value either
        with pytest.raises(SmpqError, match=r"small\.weight at 2 bits.* is nan.*leaves last; .*fixed="):
            search(fixed={})
    assert search(fixed={"small": 8}).measured_loss < np.inf


class OwnMethod:
    """A class where an object is wanted; its answer is none."""

    def allocate(self, problem: object) -> None:
        return None


def test_an_own_method_without_an_answer_is_named(net: Net) -> None:
    with pytest.raises(SmpqError, match=r"method ownmethod: allocate returned None, not a smpq_ext\.core\.Answer"):
        run(net, method=OwnMethod())


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
        ({"store": ":memory:"}, "store: ':memory:' keeps nothing"),
        ({"progress": 3}, "progress"),
        ({"method": OwnMethod}, "method: a name"),
    ):
        with pytest.raises(SmpqError, match=message):
            run(net, **settings)
