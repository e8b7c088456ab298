"""Shapley values of bit-width games: how near each estimator comes, by evaluations and by seconds.

"interval": from every slot at 2 bits to every slot at 8; "near b": every slot a step below or above b bits; weights and
activations from {2, 3, 4, 6, 8} bits, the value is minus the cross entropy on 256 images (MobileNet v1: 32), or, where
it says so, the accuracy, as the sampler of SMPQ wants it ('truncated'). "synthetic": sums of products of 1 to k random
players. "n": players. "budget": evaluations allowed, "m": made. "error": relative squared error, sum of squares of the
difference from the truth by that of the truth, mean ± standard error over the seeds. "tau": Kendall's, of the ranks.
"seconds": m times what an evaluation of this estimator's coalitions takes on our engine, and the estimator's own time.
"B2 seconds": the same evaluations by a loop over torch's own ops (benchmarks/baselines.py). The truth is exact for
synthetic games, else the mean of two long runs of antithetic permutations; "truth": what its own error is, as they show
it.

    python -m benchmarks.sampling [--seeds 3] [--games "near 3" ...] [--estimators control ...] [--most 100]

Arms of shapiq are there where it is installed (`pip install smpq_ext[bench]`). Values are kept in the folder that
SMPQ_CACHE names (default: smpq_ext in the folder for temporary files), so a second run only takes times.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from scipy.stats import kendalltau
from torch import Tensor

import smpq_ext
from benchmarks import data, models
from benchmarks.baselines import Baseline
from benchmarks.bench_engine import BITS, THREADS, evaluators
from benchmarks.environment import RESULTS, facts, note_of, save_table
from benchmarks.timing import keep_freed_memory, seconds
from smpq_ext import registry
from smpq_ext.core import Attribution, Coalitions, Game, TooFew, Values
from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.engine.gradients import squared_gradients
from smpq_ext.games import IntervalGame
from smpq_ext.store import Recorded, SqliteStore

TRUTH = 250  # evaluations for each player, in each of two runs
TIMES = (1, 2, 3, 5, 7, 10, 20, 50)  # evaluations for each player
LONG = (100,)  # and of the samplers that the plain loop uses, to see when they reach the goal
TIMED = 10  # of which one is timed without what is kept
PLAIN, PAPER = "permutation", "truncated"  # the second of accuracies only, the goal of those games comes from it
GAMES: dict[str, tuple[str, float | None] | int] = {
    "interval": ("ResNet-20", None),
    "near 2.5": ("ResNet-20", 2.5),
    "near 3": ("ResNet-20", 3),
    "near 4": ("ResNet-20", 4),
    "near 3, re-estimated": ("ResNet-20, re-estimated", 3),
    "near 3, MobileNet v1": ("MobileNet v1", 3),
    "interval, accuracy": ("ResNet-20, accuracy", None),
    "near 3, accuracy": ("ResNet-20, accuracy", 3),
    "synthetic, order 3": 3,
    "synthetic, order 8": 8,
}


class Synthetic:
    """A sum of products of random sets of up to `order` players; every product is shared equally by its players."""

    def __init__(self, order: int, players: int = 40, terms: int = 400) -> None:
        rng = np.random.default_rng(order)
        self.players, self.spent = players, 0
        self.sets = [rng.permutation(players)[: rng.integers(1, order + 1)] for _ in range(terms)]
        self.weights = rng.normal(size=terms)
        self.shapley = np.zeros(players)
        for members, weight in zip(self.sets, self.weights, strict=True):
            self.shapley[members] += weight / len(members)

    def __call__(self, coalitions: Coalitions) -> Values:
        self.spent += len(coalitions)
        whole = np.stack([coalitions[:, members].all(axis=1) for members in self.sets], axis=1)
        return np.asarray(whole @ self.weights, np.float64)


class Shapiq:
    """An approximator of shapiq as an estimator; complement pairs where it knows them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.settings = {"KernelSHAP": {"pairing_trick": True}, "SVARM": {"pairing_trick": True}}.get(name, {})

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Any:
        from shapiq import approximator

        def ask(coalitions: Any) -> Values:
            return game(np.atleast_2d(coalitions).astype(np.bool_))

        seed = int(rng.integers(2**31))
        found = getattr(approximator, self.name)(game.players, random_state=seed, **self.settings).approximate(
            budget, ask
        )
        values = np.asarray(found.get_n_order_values(1), np.float64)
        yield Attribution(values, np.full(game.players, np.nan), budget)


def arms(accuracies: bool) -> dict[str, Callable[[], Any]]:
    """Every estimator by name; 'exact' needs 2^n evaluations, the values of 'interactions' are those of 'odd'."""
    left_out = {"exact", "interactions"} | (set() if accuracies else {PAPER})
    ours = {name: registry.find("estimators", name) for name in registry.names("estimators") if name not in left_out}
    theirs = ("KernelSHAP", "kADDSHAP", "SVARM", "PermutationSamplingSV")
    if importlib.util.find_spec("shapiq") is None:
        return ours
    return ours | {f"shapiq {name}": functools.partial(Shapiq, name) for name in theirs}


@functools.cache
def evaluator(name: str) -> TorchEvaluator:
    if name != "ResNet-20, accuracy":
        return evaluators(name)
    x, y = data.cifar10_kept_out()
    model, batches = models.load_resnet20_jpeg(), [(x[:256], y[:256])]
    return smpq_ext.evaluator(model, batches, bits=BITS, fixed={}, renormalize=False, loss=minus_accuracy)


def minus_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs.argmax(-1) == targets).float().mean()


@functools.cache
def cache() -> Path:
    folder = Path(os.environ.get("SMPQ_CACHE", Path(tempfile.gettempdir()) / "smpq_ext"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make(name: str, evaluate: Any) -> IntervalGame:
    """The game on an evaluator, or on one that keeps what it is asked."""
    bits = GAMES[name][1]  # type: ignore[index]
    space = evaluate.space
    if bits is None:
        return IntervalGame(evaluate, space.lowest(), space.highest())
    level = int(np.searchsorted(BITS, bits, "right")) - 1
    below, above = (np.clip(level + step, 0, space.highest()).astype(np.int8) for step in (-1, 1))
    return IntervalGame(evaluate, below, above)


def truth(game: IntervalGame) -> tuple[Values, float]:
    """Shapley values [players], and their relative squared error as two halves show it."""
    ends = "".join(map(str, [*game.low, *game.high]))
    file = cache() / f"truth-{game.evaluator.fingerprint[:32]}-{ends}-{TRUTH}.npy"
    if not file.exists():
        estimator = registry.find("estimators", "antithetic")
        halves = [run(estimator, game, TRUTH * game.players, seed)[0].values for seed in (1001, 1002)]
        np.save(file.with_suffix(".tmp.npy"), np.stack(halves))
        file.with_suffix(".tmp.npy").replace(file)
    halves = np.load(file, allow_pickle=False)
    values = halves.mean(axis=0)
    return values, float(((halves[0] - halves[1]) ** 2).sum() / 4 / (values**2).sum())


def run(estimator: Callable[[], Any], game: Game, budget: int, seed: int) -> tuple[Attribution, float]:
    """The attribution with the evaluations that were spent, and seconds."""
    start, before = time.perf_counter(), game.spent
    for found in estimator().steps(game, budget, np.random.default_rng(seed)):
        last = found
    return dataclasses.replace(last, evaluations=game.spent - before), time.perf_counter() - start


def seconds_of_b2(ev: TorchEvaluator, game: IntervalGame) -> float:
    """Of one evaluation."""
    rows = game.assignments(np.random.default_rng(0).random((4, game.players)) < 0.5)
    loop = Baseline(ev, "B2")
    loop.losses(rows[:1])
    return float(np.median([seconds(functools.partial(loop.losses, rows[k : k + 1])) for k in range(4)]))


def measure(name: str, estimators: Sequence[str], seeds: int, most: float) -> list[dict[str, Any]]:
    """A row for every estimator and budget."""
    kind = GAMES[name]
    machine = facts()
    if isinstance(kind, int):
        game: Any = Synthetic(kind)
        exact, own_error, b2, fisher = game.shapley, 0.0, None, None
    else:
        ev = evaluator(kind[0])
        store = SqliteStore(cache() / "sampling.db")
        game = make(name, Recorded(ev, store))
        exact, own_error = truth(game)
        b2 = seconds_of_b2(ev, game)
        fisher = None if name.endswith("accuracy") else seconds(functools.partial(squared_gradients, ev))
    rows = []
    for arm, estimator in arms(name.endswith("accuracy")).items():
        if estimators and arm not in estimators:
            continue
        each = None  # seconds of an evaluation
        for times in (t for t in (*TIMES, *(LONG if arm in (PLAIN, PAPER) else ())) if t <= most):
            budget = times * game.players
            try:
                found = [run(estimator, game, budget, seed)[0] for seed in range(seeds)]
            except TooFew:
                continue
            own = float(np.median([run(estimator, game, budget, seed)[1] for seed in range(seeds)]))  # all known now
            if not isinstance(kind, int) and each is None:
                fresh, took = run(estimator, make(name, ev), max(budget, TIMED * game.players), seeds)
                kept = run(estimator, game, max(budget, TIMED * game.players), seeds)[1]
                kept = min(kept, run(estimator, game, max(budget, TIMED * game.players), seeds)[1])
                each = (took - kept) / fresh.evaluations
            errors = [float(((f.values - exact) ** 2).sum() / (exact**2).sum()) for f in found]
            m = float(np.mean([f.evaluations for f in found]))
            rows.append(
                {
                    "game": name,
                    "n": game.players,
                    "estimator": arm,
                    "budget": f"{times} n",
                    "m": round(m),
                    "error": float(np.mean(errors)),
                    "±": float(np.std(errors, ddof=1) / seeds**0.5) if seeds > 1 else float("nan"),
                    "tau": float(np.mean([kendalltau(f.values, exact).statistic for f in found])),
                    "seconds": own + (each or 0.0) * m,
                    "B2 seconds": None if b2 is None else b2 * m,
                    "truth": own_error,
                    "Fisher seconds": fisher,
                    "processor": machine["processor"],
                    "commit": machine["commit"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def reached(rows: Sequence[dict[str, Any]], goal: float, by: str) -> float | None:
    """Where the error falls to the goal, between two budgets along a straight line of logarithms."""
    points = [(r["error"], r[by]) for r in sorted(rows, key=lambda r: r["m"]) if r[by] is not None]
    for (e0, x0), (e1, x1) in itertools.pairwise(points):
        if e1 <= goal < e0:
            share = np.log(e0 / goal) / np.log(e0 / e1)
            return float(x0 * (x1 / x0) ** share)
    return points[0][1] if points and points[0][0] <= goal else None


def summary(table: Sequence[dict[str, Any]], goal: float = 0.01) -> list[dict[str, Any]]:
    """What it takes to reach the goal, and how often the plain loop takes that.

    The plain loop's sampler is 'permutation'; in games of accuracies it is 'truncated', and the goal what that reaches.
    """
    found = []
    for game in dict.fromkeys(row["game"] for row in table):
        of: dict[str, list[dict[str, Any]]] = {}
        for row in table:
            if row["game"] == game:
                of.setdefault(row["estimator"], []).append(row)
        plain, wanted = PLAIN, goal
        if PAPER in of:
            plain, wanted = PAPER, 1.1 * min(row["error"] for row in of[PAPER])
        loop = reached(of.get(plain, []), wanted, "B2 seconds")
        for estimator, rows in of.items():
            took, fisher = reached(rows, wanted, "seconds"), rows[0]["Fisher seconds"]
            found.append(
                {
                    "game": game,
                    "error": wanted,
                    "estimator": estimator,
                    "evaluations": reached(rows, wanted, "m"),
                    "seconds": took,
                    "gradient passes": took / fisher if took and fisher else None,
                    "plain loop, seconds": loop,
                    "ratio": loop / took if loop and took else None,
                }
            )
    return found


def curves(table: Sequence[dict[str, Any]]) -> Figure:
    """Error against evaluations and against seconds, a row of axes for every game."""
    games = [g for g in dict.fromkeys(row["game"] for row in table)]
    figure = Figure(figsize=(10, 3 * len(games)), layout="constrained")
    axes = figure.subplots(len(games), 2, squeeze=False)
    names = list(dict.fromkeys(row["estimator"] for row in table))
    for line, game in zip(axes, games, strict=True):
        for axis, by in zip(line, ("m", "seconds"), strict=True):
            for k, name in enumerate(names):
                rows = [r for r in table if (r["game"], r["estimator"]) == (game, name)]
                if not rows:
                    continue
                style = {"color": f"C{k % 10}", "linestyle": "--" if name.startswith("shapiq") else "-"}
                axis.plot([r[by] for r in rows], [r["error"] for r in rows], marker=".", label=name, **style)
                loop = [r["B2 seconds"] for r in rows]
                if by == "seconds" and name in (PLAIN, PAPER) and loop[0] is not None:
                    axis.plot(loop, [r["error"] for r in rows], ":", color=f"C{k % 10}", label=f"{name} on B2")
            axis.set(xscale="log", yscale="log", title=game, xlabel={"m": "evaluations"}.get(by, by), ylabel="error")
    figure.legend(*_legend(axes), loc="outside lower center", ncols=5, fontsize=7)
    return figure


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    known = {}
    for axis in axes.ravel():
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(label, line)
    return list(known.values()), list(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--estimators", nargs="+", default=[], help="default: all that there are")
    parser.add_argument("--most", type=float, default=LONG[-1], help="evaluations for each player, at most")
    parser.add_argument("--threads", type=int, default=THREADS)
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    for name in given.games:
        save(measure(name, given.estimators, given.seeds, given.most), given.seeds)


def save(rows: Sequence[dict[str, Any]], seeds: int) -> None:
    """Into the table that is kept, in place of the rows of these games and estimators: all of it takes hours."""
    kept, fresh = RESULTS / "sampling.json", {(row["game"], row["estimator"]) for row in rows}
    known = json.loads(kept.read_text())["rows"] if kept.exists() else []
    table = [row for row in known if (row["game"], row["estimator"]) not in fresh] + list(rows)
    order = [(game, arm) for game in GAMES for arm in dict.fromkeys(row["estimator"] for row in table)]
    table.sort(key=lambda row: (order.index((row["game"], row["estimator"])), row["m"]))
    note = note_of(__doc__)
    save_table("sampling", table, f"{note} {seeds} seeds.")
    save_table(
        "sampling_goal",
        summary(table),
        "What it takes to come down to an error, read between the budgets of sampling.md on a line of logarithms: "
        "0.01, or in games of accuracies a tenth above the least that the sampler of SMPQ (truncated) came to. "
        "Gradient passes: seconds in units of a pass that scores all slots by squared gradients (method gradient).",
    )
    figure = curves(table)
    FigureCanvasSVG(figure).print_svg(RESULTS / "sampling.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
