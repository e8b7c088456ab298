"""Shapley values of bit-width games: how near each estimator comes, by evaluations and by seconds.

"interval": from every slot at 2 bits to every slot at 8; "near b": every slot a step below or above b bits; weights and
activations from {2, 3, 4, 6, 8} bits, cross entropy on 256 images (MobileNet v1: 39). "n": players. "m": evaluations.
"error": relative squared error, sum of squares of the difference from the truth by that of the truth, mean ± standard
error over the seeds. "tau": Kendall's, of the ranks. "seconds": of the whole run on our engine, with the estimator's
own time. "B2 seconds": the same evaluations by a loop over torch's own ops (benchmarks/baselines.py). The truth is the
mean of two long runs of antithetic permutations; "truth": the share that their difference makes of it, as an error.

    python -m benchmarks.sampling [--seeds 3] [--games "near 3" ...] [--most 20]

Truths are kept in the folder that SMPQ_CACHE names (default: smpq_ext in the folder for temporary files).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from benchmarks.baselines import Baseline
from benchmarks.bench_engine import BITS, THREADS, evaluators
from benchmarks.environment import save_table
from benchmarks.timing import keep_freed_memory, seconds
from smpq_ext import registry
from smpq_ext.core import SmpqError, Values
from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.games import IntervalGame

TRUTH = 300  # evaluations for each player, in each of two runs
TIMES = (2, 3, 5, 7, 10, 20, 50)  # evaluations for each player
# 'exact' needs 2^n; 'truncated' a positive value such as an accuracy, and its bias is shown in search tables by 'smpq'.
ESTIMATORS = [name for name in registry.names("estimators") if name not in ("exact", "truncated")]
GAMES = {
    "interval": ("ResNet-20", None),
    "near 2.5": ("ResNet-20", 2.5),
    "near 3": ("ResNet-20", 3),
    "near 4": ("ResNet-20", 4),
    "near 3, re-estimated": ("ResNet-20, re-estimated", 3),
    "near 3, MobileNet v1": ("MobileNet v1", 3),
}


def make(name: str) -> IntervalGame:
    model, bits = GAMES[name]
    ev = evaluators(model)
    if bits is None:
        return IntervalGame(ev, ev.space.lowest(), ev.space.highest())
    level = int(np.searchsorted(BITS, bits, "right")) - 1
    around = (np.clip(level + step, 0, ev.space.highest()) for step in (-1, 1))
    return IntervalGame(ev, *(row.astype(np.int8) for row in around))


def truth(game: IntervalGame) -> tuple[Values, float]:
    """Shapley values [players], and their relative squared error as two halves show it."""
    folder = Path(os.environ.get("SMPQ_CACHE", Path(tempfile.gettempdir()) / "smpq_ext"))
    folder.mkdir(parents=True, exist_ok=True)
    ends = "".join(map(str, [*game.low, *game.high]))
    file = folder / f"truth-{game.evaluator.fingerprint[:32]}-{ends}-{TRUTH}.npy"
    if not file.exists():
        halves = [run("antithetic", game, TRUTH * game.players, seed)[0] for seed in (1001, 1002)]
        np.save(file, np.stack(halves))
    halves = np.load(file, allow_pickle=False)
    values = halves.mean(axis=0)
    return values, float(((halves[0] - halves[1]) ** 2).sum() / 4 / (values**2).sum())


def run(estimator: str, game: IntervalGame, budget: int, seed: int) -> tuple[Values, int, float]:
    """Values [players], the evaluations that were spent, and seconds."""
    start = time.perf_counter()
    for last in registry.find("estimators", estimator)().steps(game, budget, np.random.default_rng(seed)):
        found = last
    return found.values, found.evaluations, time.perf_counter() - start


def seconds_of_b2(ev: TorchEvaluator, game: IntervalGame) -> float:
    """Of one evaluation."""
    rows = game.assignments(np.random.default_rng(0).random((4, game.players)) < 0.5)
    loop = Baseline(ev, "B2")
    loop.losses(rows[:1])
    return float(np.median([seconds(functools.partial(loop.losses, rows[k : k + 1])) for k in range(4)]))


def measure(name: str, seeds: int, most: float) -> list[dict[str, Any]]:
    game = make(name)
    exact, own_error = truth(game)
    b2 = seconds_of_b2(game.evaluator, game)
    rows = []
    for estimator in ESTIMATORS:
        for times in (t for t in TIMES if t <= most):
            budget = times * game.players
            try:
                found = [run(estimator, game, budget, seed) for seed in range(seeds)]
            except SmpqError:  # too few evaluations for this one
                continue
            errors = [float(((values - exact) ** 2).sum() / (exact**2).sum()) for values, _, _ in found]
            error = float(np.std(errors, ddof=1) / seeds**0.5) if seeds > 1 else float("nan")
            rows.append(
                {
                    "game": name,
                    "n": game.players,
                    "estimator": estimator,
                    "m": found[0][1],
                    "error": float(np.mean(errors)),
                    "±": error,
                    "tau": float(np.mean([kendalltau(values, exact).statistic for values, _, _ in found])),
                    "seconds": float(np.median([took for _, _, took in found])),
                    "B2 seconds": b2 * found[0][1],
                    "truth": own_error,
                }
            )
            print(rows[-1], flush=True)
    return rows


def reached(rows: list[dict[str, Any]], goal: float, by: str) -> float | None:
    """Where the error falls to the goal, between two budgets along a straight line of logarithms."""
    points = [(r["error"], r[by]) for r in sorted(rows, key=lambda r: r["m"])]
    for (e0, x0), (e1, x1) in itertools.pairwise(points):
        if e1 <= goal < e0:
            share = np.log(e0 / goal) / np.log(e0 / e1)
            return float(x0 * (x1 / x0) ** share)
    return points[0][1] if points and points[0][0] <= goal else None


def summary(table: list[dict[str, Any]], goal: float = 0.01) -> list[dict[str, Any]]:
    """What an error of `goal` takes: evaluations and seconds, and how often the plain loop's permutations take that."""
    found = []
    for game in dict.fromkeys(row["game"] for row in table):
        of = {e: [r for r in table if (r["game"], r["estimator"]) == (game, e)] for e in ESTIMATORS}
        plain = reached(of["permutation"], goal, "B2 seconds")
        for estimator, rows in of.items():
            took = reached(rows, goal, "seconds")
            found.append(
                {
                    "game": game,
                    "estimator": estimator,
                    "evaluations": reached(rows, goal, "m"),
                    "seconds": took,
                    "permutations on B2, seconds": plain,
                    "ratio": plain / took if plain and took else None,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--most", type=float, default=TIMES[-1], help="evaluations for each player, at most")
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    table = [row for name in given.games for row in measure(name, given.seeds, given.most)]
    note = " ".join((__doc__ or "").partition("    python")[0].split())
    save_table("sampling", table, f"{note} {given.seeds} seeds.")
    goal = (
        "What a relative squared error of 0.01 takes, read between the budgets of sampling.md on a line of logarithms."
    )
    save_table("sampling_goal", summary(table), goal)


if __name__ == "__main__":
    main()
