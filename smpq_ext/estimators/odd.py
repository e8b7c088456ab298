"""Shapley values by a regression of the odd part of the game on single players and all triples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky

from smpq_ext.core import Attribution, Game, Values
from smpq_ext.estimators.adjusted import missed_by
from smpq_ext.estimators.leverage import Drawn, Fit, ask_pairs, jackknife

__all__ = ["Odd"]

SHARES = (0.0, 0.03, 0.1, 0.3, 0.6, 0.9)  # of the prior variance that triples have
NOISES = (1e-10, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # variance of what is neither, in units of the prior's
CHOOSE = 600  # so many pairs tell which of them it is
END = 1e-4  # noise of the pair of all and none, in units of the others': its gap is the sum of the values


@dataclass(frozen=True)
class Odd:
    """Ridge regression of v(S) - v(complement) on the parities of one and of three players.

    Shapley values depend on the odd part of a game alone, and there a parity is shared equally by its players. The
    kernel of all triples is a polynomial of the inner product of two coalitions' signs, so thousands of them cost
    nothing, and how much they and the noise may explain is what is likeliest. Exact for games of order two, and for
    those of order four once there are enough pairs; else drawn towards 0 by the ridge, which pays from 1.25 x players
    evaluations on. Sizes that are enumerated are exact. Pairs are drawn as by 'leverage'; standard errors are
    delete-one jackknife errors over them. `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than players pairs (or all, if there are fewer). Source: Fumagalli,
    Butler, Kang, Ramchandran, Witter, An odd estimator for Shapley values (arXiv 2602.01399), here with every triple in
    place of picked interactions, by the kernel of Duvenaud, Nickisch, Rasmussen, Additive Gaussian processes (2011).
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        for drawn in ask_pairs("odd regression", game, budget, game.players, self.batch, rng):
            found = fit(drawn)
            yield Attribution(found.values, jackknife(drawn, found.solve, found.left_out), drawn.evaluations)


def fit(drawn: Drawn) -> Fit:
    """The regression of the gaps, and of the gap of all and none, which is nearly exact."""
    players = drawn.coalitions.shape[1]
    signs = np.concatenate([drawn.signs, np.ones((1, players))])
    gaps = np.append(drawn.gaps, drawn.total)
    inner = signs @ signs.T
    some = np.append(np.arange(min(CHOOSE, len(gaps) - 1)), len(gaps) - 1)
    few, best = np.ix_(some, some), (-np.inf, 0.0, 0.0)
    for share, noise in product(SHARES if players > 2 else SHARES[:1], NOISES):
        best = max(best, (likelihood(_kernel(inner[few], players, share, noise), gaps[some]), share, noise))
    _, share, noise = best

    factor = cholesky(_kernel(inner, players, share, noise), lower=True)
    inverse = cho_solve((factor, True), np.eye(len(gaps)))
    dual = cho_solve((factor, True), gaps)
    # Each parity's coefficient is (signs' products) @ dual; one of three players gives each of them a third.
    owner = (1 - share) / players * signs
    if share:
        others = signs.sum(axis=1, keepdims=True) - signs
        pairs = (others**2 - (players - 1)) / 2  # sum of the products of two others
        owner = owner + share / _triples(float(players), players) / 3 * signs * pairs
    values = owner.T @ dual
    solve = (owner.T @ inverse)[:, :-1]
    residuals = (noise * dual)[:-1]
    values += missed_by(drawn, np.where(drawn.seen < 1, 0, residuals), np.zeros(len(residuals)))[0]
    left_out = (dual / np.diag(inverse))[:-1]
    return Fit(values + (drawn.total - values.sum()) / players, residuals, left_out, solve)


def _kernel(inner: NDArray[np.float64], players: int, share: float, noise: float) -> NDArray[np.float64]:
    """Covariance of gaps from the inner products of their signs, the last row being that of all against none."""
    kernel = (1 - share) / players * inner
    if share:
        kernel = kernel + share / _triples(float(players), players) * _triples(inner, players)
    kernel[np.diag_indices(len(kernel))] += np.append(np.full(len(kernel) - 1, noise), noise * END)
    return kernel


def _triples(inner: Any, players: int) -> Any:
    """The sum over all triples of the products of their parities, from the sum over all players: Newton's identity."""
    return (inner**3 - (3 * players - 2) * inner) / 6


def likelihood(kernel: NDArray[np.float64], gaps: Values) -> float:
    """Of the gaps, their scale being the likeliest one."""
    try:
        factor = cholesky(kernel, lower=True)
    except LinAlgError:
        return -np.inf
    scale = float(gaps @ cho_solve((factor, True), gaps)) / len(gaps)
    return float(-0.5 * len(gaps) * np.log(max(scale, 1e-300)) - np.log(np.diag(factor)).sum())
