"""Whether intervals of 95 % hold the truth: how often they do, for every estimator, from its least budget on.

Games of n players whose Shapley values are known from all coalitions: "saturates": the logistic function of a sum;
"weakest": the largest damage counts; "order 3": sums of products of one to three players; "noise": additive, and each
coalition has an independent error of a tenth of that; "damage": an exponential, with a little noise. "m": evaluations
allowed: the least that the estimator takes, 2 n + 2, 4 n and 10 n, where it takes them. A column of a game tells the
share of players whose value is within 1.96 standard errors of the estimate, over all runs; "lowest" and "mean" are over
the games; "wide": the median over the runs of the standard errors' root mean square, by that of the errors made: 1 is
right, 2 is twice as careful as there is need for, and "–" is where they are infinite, which holds everything: an
estimator that has seen too little to tell ('stratified', one coalition of a kind) says so.

    python -m benchmarks.coverage [--runs 40] [--estimators control ...] [--players 6 8 12]
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import note_of, save_table
from smpq_ext import registry
from smpq_ext.core import Attribution, Coalitions, TooFew, Values

WITHOUT = ("exact", "truncated")  # no error to tell; of another game
GAMES = ("saturates", "weakest", "order 3", "noise", "damage")


class Table:
    """A game of which every value is known."""

    def __init__(self, kind: str, players: int, seed: int) -> None:
        self.players, self.spent = players, 0
        self.ways = 1 << np.arange(players)
        inside = (np.arange(2**players)[:, None] & self.ways) > 0
        self.table = values_of(kind, inside, np.random.default_rng(seed))

    def __call__(self, coalitions: Coalitions) -> Values:
        self.spent += len(coalitions)
        return self.table[coalitions @ self.ways]


def values_of(kind: str, inside: NDArray[np.bool_], rng: np.random.Generator) -> Values:
    """Of all coalitions [2^players, players]."""
    coalitions, players = inside.shape
    weights = np.abs(rng.normal(size=players))
    match kind:
        case "saturates":
            return 0.1 + 1 / (1 + np.exp(-(inside @ weights)))
        case "weakest":
            return -np.where(inside, 0.0, weights).max(axis=1)
        case "order 3":
            sets = [rng.permutation(players)[: rng.integers(1, 4)] for _ in range(10 * players)]
            return np.stack([inside[:, members].all(axis=1) for members in sets], axis=1) @ rng.normal(size=len(sets))
        case "noise":
            additive = inside @ weights
            return additive + 0.1 * additive.std() * rng.normal(size=coalitions)
        case _:
            return -np.exp(-(inside @ rng.lognormal(-1, 0.7, players))) + 0.02 * rng.normal(size=coalitions)


def budgets(name: str, game: Table) -> dict[int, str]:
    """Evaluations: how the table names them."""
    players = game.players
    try:
        attribution(name, game, 0, 0)
        least = 0
    except TooFew as error:
        least = int(re.findall(r"\d+", str(error))[-1])
    named = {10 * players: "10 n", 4 * players: "4 n", 2 * players + 2: "2 n + 2", least: "least"}
    return {m: named[m] for m in sorted(named) if least <= m < 2**players}


def attribution(name: str, game: Table, budget: int, seed: int) -> Attribution:
    """The last that an estimator gives."""
    *_, found = registry.find("estimators", name)().steps(game, budget, np.random.default_rng(seed))
    return found


def rows(name: str, players: int, runs: int) -> list[dict[str, Any]]:
    games = {kind: [Table(kind, players, seed) for seed in range(runs)] for kind in GAMES}
    truths = {kind: [attribution("exact", game, 2**players, 0).values for game in games[kind]] for kind in GAMES}
    found = []
    for budget, called in budgets(name, games[GAMES[0]][0]).items():
        held: dict[str, float] = {}
        made, told = [], []
        for kind in GAMES:
            inside = []
            for seed, (game, truth) in enumerate(zip(games[kind], truths[kind], strict=True)):
                answer = attribution(name, game, budget, seed)
                error, size = np.abs(answer.values - truth), answer.standard_errors
                inside.append(np.mean(error <= 1.96 * size + 1e-9 * np.abs(truth).max()))
                made.append(np.sqrt(np.mean(error**2)))
                told.append(np.sqrt(np.mean(size**2)))
            held[kind] = float(np.mean(inside))
        wide = float(np.median(np.array(told) / np.maximum(made, 1e-12)))
        over: dict[str, float | None] = {"lowest": min(held.values()), "mean": float(np.mean(list(held.values())))}
        over["wide"] = wide if np.isfinite(wide) else None
        found.append({"estimator": name, "n": players, "budget": called, "m": budget, **held, **over})
        print(found[-1], flush=True)
    return found


def main() -> None:
    known = [name for name in registry.names("estimators") if name not in WITHOUT]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--estimators", nargs="+", choices=known, default=known)
    parser.add_argument("--players", type=int, nargs="+", default=[6, 8, 12])
    asked = parser.parse_args()
    table = [row for name in asked.estimators for n in asked.players for row in rows(name, n, asked.runs)]
    if asked.estimators == known:
        save_table("coverage", table, note_of(__doc__))


if __name__ == "__main__":
    main()
