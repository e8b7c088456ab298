"""Whether intervals of 95 % hold the truth, for every estimator of Shapley values, from its least budget on.

Games of n players whose values are known from all coalitions: "saturates": the logistic function of a sum; "weakest":
the largest damage counts; "order 3": sums of products of one to three players; "noise": additive, and each coalition
has an independent error of a tenth of that; "damage": an exponential with a little noise. 'control' is asked games
that are means of eight groups' and tell how the value changes with each player's share, off by a fifth ("passes,
parts"), and those without the groups ("passes"); with neither it is 'odd'. "m": evaluations allowed: the least that an
estimator takes, 2 n + 2, 4 n and 10 n.

The column of a game tells the share of players whose value is within 1.96 standard errors of the estimate; "mean" is
over the games, "±" its standard error over the runs, "largest" the share of runs that hold the player of the largest
value, which is the hardest. "wide": the median ratio of the errors told to those made, root mean squares over the
players of a run. "–": in a run at least an error is infinite: the estimator has seen too little to tell, and says so.

    python -m benchmarks.coverage [--runs 40] [--estimators control ...] [--players 6 8 12 16]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import note_of, save_table
from smpq_ext import registry
from smpq_ext.core import Attribution, Coalitions, TooFew, Values
from smpq_ext.stopping import CERTAIN

WITHOUT = ("exact", "truncated", "interactions")  # no error to tell; of another game; the values of 'odd'
GAMES = ("saturates", "weakest", "order 3", "noise", "damage")
KINDS = {"control": ("passes, parts", "passes")}  # of games that an estimator is asked, besides plain ones
GROUPS, OFF = 8, 0.2


class Known:
    """A game of which every value is known, the mean of `tables` [groups, 2^players]."""

    def __init__(self, tables: NDArray[np.float64]) -> None:
        self.tables, self.players, self.spent = tables, int(np.log2(tables.shape[1])), 0
        self.ways = 1 << np.arange(self.players)

    def __call__(self, coalitions: Coalitions) -> Values:
        self.spent += len(coalitions)
        return np.asarray(self.tables[:, coalitions @ self.ways].mean(axis=0))


class Passes(Known):
    """One that tells derivatives: of the multilinear extension, each player's off by a factor of its own."""

    def derivatives(self, points: Values) -> NDArray[np.float64]:
        self.spent += len(points)
        every, inside = self.tables.mean(axis=0), (np.arange(self.tables.shape[1])[:, None] & self.ways) > 0
        off = 1 + OFF * np.random.default_rng(self.players).normal(size=self.players)
        found = []
        for share in points:
            chance = np.where(inside, share, 1 - share)  # [coalitions, players]
            others = chance.prod(axis=1)[:, None] / chance
            found.append(off * (np.where(inside, 1, -1) * others * every[:, None]).sum(axis=0))
        return np.array(found)


class PassesAndParts(Passes):
    """And is a mean of games, on a group of the samples each."""

    def parts(self, most: int) -> tuple[tuple[float, Known], ...]:
        return tuple((len(part) / GROUPS, Known(part)) for part in np.array_split(self.tables, min(most, GROUPS)))


def game_of(kind: str, asked: str, players: int, seed: int) -> Known:
    rng = np.random.default_rng(seed)
    inside = (np.arange(2**players)[:, None] & (1 << np.arange(players))) > 0
    weights = np.abs(rng.normal(size=players))
    groups = GROUPS if asked == "passes, parts" else 1
    tables = [
        values_of(kind, inside, weights * rng.lognormal(0, 0.3 * (groups > 1), players), rng) for _ in range(groups)
    ]
    return {"": Known, "passes": Passes, "passes, parts": PassesAndParts}[asked](np.stack(tables))


def values_of(kind: str, inside: NDArray[np.bool_], weights: Values, rng: np.random.Generator) -> Values:
    """Of all coalitions [2^players, players]."""
    coalitions, players = inside.shape
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
        case _:  # damage
            return -np.exp(-(inside @ (weights / 2))) + 0.02 * rng.normal(size=coalitions)


def attribution(name: str, game: Known, budget: int, seed: int) -> Attribution:
    """The last that an estimator gives."""
    *_, found = registry.find("estimators", name)().steps(game, budget, np.random.default_rng([seed, 1]))
    return found


def budgets(name: str, game: Known) -> dict[int, str]:
    """Evaluations: how the table names them."""
    players, least = game.players, 0
    while True:
        try:
            spent = {attribution(name, game, least, 0).evaluations}
            break
        except TooFew:
            least += 1
    named = {least: "least"}
    for m, called in ((2 * players + 2, "2 n + 2"), (4 * players, "4 n"), (10 * players, "10 n")):
        if least < m < 2**players:
            made = attribution(name, game, m, 0).evaluations
            if made not in spent:
                named[m] = called
            spent.add(made)
    return named


def rows(name: str, asked: str, players: int, runs: int) -> list[dict[str, Any]]:
    games = {kind: [game_of(kind, asked, players, seed) for seed in range(runs)] for kind in GAMES}
    truths = {kind: [attribution("exact", game, 2**players, 0).values for game in games[kind]] for kind in GAMES}
    found = []
    for budget, called in budgets(name, games[GAMES[0]][0]).items():
        held, largest, ratios = np.empty((len(GAMES), runs)), [], []
        for k, kind in enumerate(GAMES):
            for seed, (game, truth) in enumerate(zip(games[kind], truths[kind], strict=True)):
                answer = attribution(name, game, budget, seed)
                error, told = np.abs(answer.values - truth), answer.standard_errors
                inside = error <= CERTAIN * told + 1e-9 * np.abs(truth).max()
                held[k, seed] = inside.mean() if np.isfinite(told).all() else np.nan
                largest.append(inside[np.abs(truth).argmax()])
                ratios.append(np.sqrt(np.mean(told**2) / max(np.mean(error**2), 1e-24)))
        finite = bool(np.isfinite(held).all())
        shares = dict(zip(GAMES, held.mean(axis=1).tolist(), strict=True)) if finite else dict.fromkeys(GAMES)
        row = {"estimator": name, "asked": asked or "values", "n": players, "budget": called, "m": budget, **shares}
        row["mean"] = float(held.mean()) if finite else None
        row["±"] = float(held.mean(axis=0).std(ddof=1) / runs**0.5) if finite else None
        row["largest"] = float(np.mean(largest)) if finite else None
        row["wide"] = float(np.median(ratios)) if finite else None
        found.append(row)
        print(row, flush=True)
    return found


def main() -> None:
    known = [name for name in registry.names("estimators") if name not in WITHOUT]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--estimators", nargs="+", choices=known, default=known)
    parser.add_argument("--players", type=int, nargs="+", default=[6, 8, 12, 16])
    given = parser.parse_args()
    table = [
        row
        for name in given.estimators
        for asked in KINDS.get(name, ("",))
        for players in given.players
        for row in rows(name, asked, players, given.runs)
    ]
    if len(sys.argv) == 1:
        save_table("coverage", table, note_of(__doc__))


if __name__ == "__main__":
    main()
