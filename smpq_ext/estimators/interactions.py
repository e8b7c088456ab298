"""Pairwise interactions beside Shapley values: Shapley, Banzhaf or faithful ones, from one set of coalitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve

from smpq_ext.core import Attribution, Game, SmpqError, Values
from smpq_ext.estimators import odd
from smpq_ext.estimators.leverage import Drawn, ask_pairs, jackknife, student
from smpq_ext.estimators.odd import END, factored, likelihood

__all__ = ["Interactions"]

INDICES = ("shapley", "banzhaf", "faithful")
SHARES = (0.0, 0.1, 0.3, 0.6)  # of the prior variance that sets of four have
NOISES = (1e-10, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHOOSE = 300  # so many pairs of coalitions tell which of them it is
LEVEL = 100.0  # prior variance of the constant, in units of the others'


@dataclass(frozen=True)
class Interactions:
    """What two players add together; values are those of 'odd', from the same pairs (coalition, complement).

    The sums v(S) + v(complement) hold what even numbers of players share. index: "shapley" averages the second
    difference evenly over the sizes of coalitions, "banzhaf" over all coalitions, which suffers less from noise: both
    by ridge regression on the parities of two and of four players, their shares and the noise being the likeliest; a
    pair that was drawn stands for itself, so sizes that are enumerated are exact. "faithful" are the pairs of the best
    second-order model under the Shapley kernel, by least squares. Standard errors of values
    are those of 'odd', of pairs delete-one jackknife errors, for the first two no less than the posterior's deviations
    with Student's factor. `batch` is about how many coalitions are asked at once.

    Raises SmpqError for another index, or where the budget is too small, and names the least. Source: Grabisch and
    Roubens, An axiomatic approach to the concept of interaction (1999); Tsai, Yeh, Ravikumar, Faith-Shap (JMLR 2023);
    parities by a kernel as in 'odd'.
    """

    index: str = "shapley"
    batch: int = 256

    def __post_init__(self) -> None:
        if self.index not in INDICES:
            raise SmpqError(f"index: {self.index!r} is not known; there are {', '.join(INDICES)}")

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players], pairs [players, players], 0 on the diagonal."""
        players = game.players
        least = players if self.index != "faithful" else comb(players, 2) + players
        fit = _least_squares if self.index == "faithful" else _ridge
        for drawn in ask_pairs("interactions", game, budget, least, self.batch, rng):
            found = odd.fit([drawn])
            pairs, pair_errors = np.zeros((2, players, players))
            for i, (row, row_errors) in enumerate(fit(drawn, self.index)):
                pairs[i], pair_errors[i] = row, row_errors
            yield Attribution(
                found.values, found.standard_errors, drawn.evaluations, pairs=pairs, pair_errors=pair_errors
            )


def _rows(drawn: Drawn) -> tuple[NDArray[np.float64], Values]:
    """Signs [rows, players] and sums [rows] of the pairs, and at last of all and none; the sums are centred."""
    sums = np.append(drawn.sums, drawn.ends)
    return np.concatenate([drawn.signs, np.ones((1, drawn.coalitions.shape[1]))]), sums - sums.mean()


def _ridge(drawn: Drawn, index: str) -> Iterator[tuple[Values, Values]]:
    """For each player its interactions [players] and their errors, by parities of two and of four."""
    signs, sums = _rows(drawn)
    players = signs.shape[1]
    inner = signs @ signs.T
    some = np.append(np.arange(min(CHOOSE, len(sums) - 1)), len(sums) - 1)
    few, best = np.ix_(some, some), (-np.inf, 0.0, 0.0)
    for share, noise in product(SHARES if players > 3 else SHARES[:1], NOISES):
        best = max(best, (likelihood(_kernel(inner[few], players, share, noise), sums[some]), share, noise))
    _, share, noise = best
    factor, noise = factored(lambda noise: _kernel(inner, players, share, noise), noise)
    inverse = cho_solve((factor, True), np.eye(len(sums)))
    dual = cho_solve((factor, True), sums)
    jitter = np.append(np.ones(len(sums) - 1), END)
    left_out = (dual / np.diag(inverse))[:-1]
    whole, scale = signs.sum(axis=1), float(sums @ dual) / len(sums)
    prior = 4 / max(comb(players, 2), 1) * (1 - (share / 3 if index == "shapley" else share))
    prior += noise * _variance(players, drawn.population, index)
    for i, own in enumerate(signs.T):
        both = own[:, None] * signs  # [rows, players]
        # a parity of two counts double in the second difference, one of four gives a third of that to each of its pairs
        owner = 2 * (1 - share) / max(comb(players, 2), 1) * both
        if share and index == "shapley":
            others = whole[:, None] - own[:, None] - signs
            owner = owner + 2 * share / comb(players, 4) / 3 * both * (others**2 - (players - 2)) / 2
        # the noise is part of the game: a pair that was drawn stands for itself with what the ridge leaves of it
        owner = owner + noise * jitter[:, None] * _second_difference(drawn.population, signs, own, index)
        solve = owner.T @ inverse
        row = owner.T @ dual
        # no less than the posterior's, which knows what the ridge has drawn towards 0
        unknown = np.maximum(prior - (solve * owner.T).sum(axis=1), 0) * (drawn.seen < 1).any()
        least = student(len(sums)) * np.sqrt(scale * unknown)
        row_errors = np.maximum(jackknife(solve[:, :-1], left_out, drawn.seen), least)
        row[i] = row_errors[i] = 0.0
        yield row, row_errors


def _second_difference(
    population: list[int], signs: NDArray[np.float64], own: Values, index: str
) -> NDArray[np.float64]:
    """What a row's sum counts for in one player's interactions, [rows, players].

    The Shapley index is the sum over the sizes s of the mean of v(S) n / (s (s - 1)) where S has both players,
    n / ((n - s) (n - s - 1)) where it has none, -n / (s (n - s)) where it has one; complements count alike.
    """
    players = signs.shape[1]
    size = (signs > 0).sum(axis=1)
    each = np.ones(players + 1)
    each[1 : len(population) + 1] = [1 / whole for whole in population]
    share = np.where(2 * size == players, 0.5, 1.0) * each[size]
    both = own[:, None] * signs
    if index == "banzhaf":
        ways = np.array([4 * comb(players, int(s)) / 2**players for s in size])
        return np.asarray((share * ways)[:, None] * both, np.float64)
    inside, outside = (players / np.maximum(s * (s - 1), 1) for s in (size, players - size))
    split = players / np.maximum(size * (players - size), 1)
    alike = np.where(own > 0, inside, outside)
    return np.asarray(share[:, None] * np.where(both > 0, alike[:, None], -split[:, None]), np.float64)


def _variance(players: int, population: list[int], index: str) -> float:
    """Of an interaction, where the sum of every pair has variance 1 and is independent, that of all and none END."""
    end = 4.0 ** (2 - players) if index == "banzhaf" else 1 / max(players - 1, 1) ** 2
    found = END * end
    for s, whole in enumerate(population, 1):
        if index == "banzhaf":
            squares = 16 * comb(players, s) ** 2 / 4**players
        else:
            ways = [way for way in (s * (s - 1), (players - s) * (players - s - 1), s * (players - s) / 2) if way]
            squares = players / (players - 1) * sum(1 / way for way in ways)
        found += squares * (1 / whole) * (0.25 if 2 * s == players else 1)
    return found


def _least_squares(drawn: Drawn, index: str) -> Iterator[tuple[Values, Values]]:
    """The same from the best model of parities of none and of two, which is exact for all and none."""
    signs, sums = _rows(drawn)
    players = signs.shape[1]
    first, second = np.triu_indices(players, 1)
    design = np.concatenate([np.ones((len(signs), 1)), signs[:, first] * signs[:, second]], axis=1)
    weights = np.append(drawn.weights, 1e8 * drawn.weights.max(initial=1.0))
    root = np.sqrt(weights)[:, None]
    solve = np.linalg.pinv(design * root, rcond=1e-10) * root.T  # [1 + pairs, rows]
    free = 1 - np.einsum("rk,kr->r", design, solve)[:-1]
    residuals = (sums - design @ (solve @ sums))[:-1]
    left_out = np.where(free > 1e-9, residuals / np.maximum(free, 1e-9), np.nan)
    place = np.zeros((players, players), np.int64)
    place[first, second] = place[second, first] = 1 + np.arange(len(first))
    for i in range(players):
        own = 2 * solve[place[i]]
        own[i] = 0.0
        yield own @ sums, jackknife(own[:, :-1], left_out, drawn.seen)


def _kernel(inner: NDArray[np.float64], players: int, share: float, noise: float) -> NDArray[np.float64]:
    """Covariance of sums from the inner products of their signs, the last row being that of all and none."""
    kernel = LEVEL + (1 - share) / max(comb(players, 2), 1) * (inner**2 - players) / 2
    if share:
        kernel = kernel + share / comb(players, 4) * _fours(inner, players)
    kernel[np.diag_indices(len(kernel))] += np.append(np.full(len(kernel) - 1, noise), noise * END)
    return kernel


def _fours(inner: Any, players: int) -> Any:
    """The sum over all sets of four of the products of their parities: Newton's identity."""
    return (inner**4 - (6 * players - 8) * inner**2 + 3 * players * (players - 2)) / 24
