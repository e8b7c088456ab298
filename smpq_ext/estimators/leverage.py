"""Shapley values by kernel regression on coalitions sampled by leverage scores, in complement pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from smpq_ext.core import Attribution, Coalitions, Game, Values, ask, pay

__all__ = ["Leverage"]


@dataclass(frozen=True)
class Leverage:
    """Least squares with the efficiency constraint on pairs (coalition, complement), sizes uniform.

    Pairs are drawn without replacement and spread evenly over the sizes; a size that is small enough is enumerated. So
    the answer is exact for games of order two, and for any game once every pair is drawn. Standard errors are
    delete-one jackknife errors over the pairs, with the finite population correction of each size. `batch` is about
    how many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than 2 x players pairs (or all, if there are fewer). Source:
    Leverage SHAP (Musco and Witter, ICLR 2025), algorithm 1.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        least = 2 * game.players
        for drawn in ask_pairs("leverage regression", game, budget, least, self.batch, rng):
            found = fit(drawn)
            yield Attribution(found.values, found.standard_errors, drawn.evaluations)


@dataclass(frozen=True)
class Drawn:
    """Pairs that were asked, and what is known of the game besides."""

    coalitions: Coalitions  # [pairs, players], the smaller of each pair
    gaps: Values  # [pairs], v(coalition) - v(complement)
    sums: Values  # [pairs], v(coalition) + v(complement)
    total: float  # v(all) - v(none)
    ends: float  # v(all) + v(none)
    population: list[int]

    @property
    def evaluations(self) -> int:
        return 2 + 2 * len(self.gaps)

    @property
    def signs(self) -> NDArray[np.float64]:
        """1 for a player of the coalition, -1 for one of the complement, [pairs, players]."""
        return np.where(self.coalitions, 1.0, -1.0)

    @property
    def weights(self) -> NDArray[np.float64]:
        """The Shapley kernel, 1 / (C(n, s) s (n - s)), x pairs of that size / pairs drawn of that size, [pairs]."""
        players = self.coalitions.shape[1]
        size = self.coalitions.sum(axis=1)
        return np.asarray(1 / (size * (players - size) * np.bincount(size)[size] * (1 + (2 * size == players))))

    @property
    def means(self) -> NDArray[np.float64]:
        """What the mean gap of its size counts for in the Shapley values, by its players, [pairs, players]."""
        players = self.coalitions.shape[1]
        size = self.coalitions.sum(axis=1, keepdims=True)
        half = np.where(2 * size == players, 0.5, 1.0)
        return np.asarray(np.where(self.coalitions, 1 / size, -1 / (players - size)) * half, np.float64)

    @property
    def owners(self) -> NDArray[np.float64]:
        """What a pair's gap counts for in the Shapley values, where every pair is known, [pairs, players]."""
        each = np.array([0.0, *(1 / whole for whole in self.population)])  # the counts themselves may be no floats
        return np.asarray(self.means * each[self.coalitions.sum(axis=1, keepdims=True)], np.float64)

    @property
    def variance(self) -> float:
        """Of a Shapley value, where every pair's gap has variance 1 and is independent."""
        players = self.coalitions.shape[1]
        ways = [s * (players - s) * (1 + 3 * (2 * s == players)) for s in range(1, len(self.population) + 1)]
        return float(sum(1 / way * (1 / whole) for way, whole in zip(ways, self.population, strict=True)))

    @property
    def seen(self) -> NDArray[np.float64]:
        """Which share of the pairs of its size has been drawn, for each pair, [pairs]."""
        size = self.coalitions.sum(axis=1)
        drawn = np.bincount(size, minlength=len(self.population) + 1)
        shares = [0.0, *(n / whole for n, whole in zip(drawn[1:], self.population, strict=True))]
        return np.asarray(np.array(shares)[size], np.float64)


def ask_pairs(
    name: str,
    game: Game,
    budget: int,
    least: int,
    batch: int,
    rng: np.random.Generator,
    order: Callable[[int, list[int], np.random.Generator], Iterator[NDArray[np.bool_]]] | None = None,
    besides: int = 0,
) -> Iterator[Drawn]:
    """All pairs so far, after every batch of them: at least `least`, or all there are.

    order: what yields the smaller coalition of each pair, `draw_pairs` by default; besides: evaluations of the budget
    that are for something else.

    Raises SmpqError, naming the estimator, where the budget does not pay for these.
    """
    players = game.players
    whole = population(players)
    least = min(sum(whole), least)
    needed = besides + 2 + 2 * least
    pay(budget, needed, players, name)
    pairs = min((budget - besides - 2) // 2, sum(whole))
    empty, full = ask(game, np.repeat([[False], [True]], players, axis=1))
    draw = (order or draw_pairs)(players, whole, rng)
    coalitions = np.empty((0, players), np.bool_)
    gaps, sums = np.empty(0), np.empty(0)
    while True:
        # batches grow, so that all fits together take a few times what the last one takes
        count = min(max(batch // 2, len(gaps) // 2, least if not len(gaps) else 1), pairs - len(gaps))
        if count:
            rows = np.array([next(draw) for _ in range(count)])
            values = ask(game, np.concatenate([rows, ~rows]))
            coalitions = np.concatenate([coalitions, rows])
            gaps = np.concatenate([gaps, values[:count] - values[count:]])
            sums = np.concatenate([sums, values[:count] + values[count:]])
        yield Drawn(coalitions, gaps, sums, float(full - empty), float(full + empty), whole)
        if len(gaps) == pairs:
            return


def population(players: int) -> list[int]:
    """How many pairs there are with 1, 2, ... players in the smaller coalition."""
    return [comb(players, s) // (1 + (2 * s == players)) for s in range(1, players // 2 + 1)]


def draw_pairs(players: int, population: list[int], rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """The smaller coalition of each pair, without end until all are drawn; every prefix is even over the sizes."""
    seen: set[bytes] = set()
    drawn = [0] * len(population)
    while True:
        # the middle size pairs with itself, so it gets half a share
        turn = [
            (n + 0.5) * (1 + (2 * s == players)) if n < whole else np.inf
            for s, (n, whole) in enumerate(zip(drawn, population, strict=True), 1)
        ]
        size = int(np.argmin(turn)) + 1
        while True:
            row = np.zeros(players, np.bool_)
            row[rng.permutation(players)[:size]] = True
            if 2 * size == players and not row[0]:
                row = ~row  # one name for a pair of two halves
            key = row.tobytes()
            if key not in seen:
                break
        seen.add(key)
        drawn[size - 1] += 1
        yield row


@dataclass(frozen=True)
class Fit:
    """A regression on pairs, which sees only their gaps."""

    values: Values  # [players]
    left_out: Values  # [pairs], residuals of the gaps, by the fit without the pair; NaN where there is none
    solve: NDArray[np.float64]  # [players, pairs], what a gap moves the values by
    seen: Values  # [pairs], which share of the pairs of its size is drawn
    besides: Values  # [players], standard errors of what is added to the regression
    least: Values  # [players], the posterior's deviations, where there is a prior: no standard error is smaller

    @property
    def standard_errors(self) -> Values:
        """Delete-one-pair jackknife errors [players], with the finite population correction of each size.

        With `besides`, and no less than `least`; infinite where, without one of the pairs, there would be no answer.
        """
        sampled = np.hypot(jackknife(self.solve, self.left_out, self.seen), self.besides)
        return np.asarray(np.maximum(sampled, self.least), np.float64)


def fit(drawn: Drawn) -> Fit:
    """Weighted least squares under the efficiency constraint: a gap is `signs @ values` for an additive game."""
    players = drawn.coalitions.shape[1]
    signs, weights = drawn.signs, drawn.weights
    targets = drawn.gaps - signs.sum(axis=1) * drawn.total / players
    signs -= signs.mean(axis=1, keepdims=True)  # what is left to fit sums to zero: the efficiency constraint

    eigenvalues, vectors = np.linalg.eigh((signs.T * weights) @ signs)
    good = eigenvalues > 1e-10 * eigenvalues[-1]
    inverse = (vectors[:, good] / eigenvalues[good]) @ vectors[:, good].T
    solve = inverse @ (signs.T * weights)
    offsets = solve @ targets
    residuals = targets - signs @ offsets
    free = 1 - np.einsum("pi,ip->p", signs, solve)
    unique = good.sum() == players - 1
    left_out = np.where(unique & (free > 1e-9), residuals / np.maximum(free, 1e-9), np.nan)
    none = np.zeros(players)
    return Fit(drawn.total / players + offsets, left_out, solve, drawn.seen, besides=none, least=none)


def student(free: int) -> float:
    """How much wider an interval of 95 % is where its width was told by so many values."""
    return float(stdtrit(free, 0.975) / stdtrit(np.inf, 0.975))


def jackknife(solve: NDArray[np.float64], left_out: Values, seen: Values) -> Values:
    """Delete-one errors [results] of what is linear in the gaps, or sums: `solve` [results, pairs] times these."""
    partly = seen < 1
    if np.isnan(left_out[partly]).any():
        return np.full(len(solve), np.inf)
    moved = solve[:, partly] * left_out[partly]
    return np.asarray(np.sqrt((moved**2 * (1 - seen[partly])).sum(axis=1)), np.float64)
