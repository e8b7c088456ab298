"""Shapley values by a regression of the odd part of the game on single players and all triples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky

from smpq_ext.core import Attribution, Game, Values
from smpq_ext.estimators.adjusted import missed_by
from smpq_ext.estimators.leverage import Drawn, Fit, ask_pairs, student

__all__ = ["Odd"]

SHARES = (0.0, 0.03, 0.1, 0.3, 0.6, 0.9)  # of the prior variance that triples have
NOISES = (1e-10, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # variance of what is neither, in units of the prior's
APART = (0.0, 0.03, 0.1, 0.3, 1.0)  # prior variance of what one part of the samples has to itself, in the same units
LEVEL = 100.0  # prior variance of a surrogate, in the same units: its coefficient is free
CHOOSE = 300  # so many pairs tell which of them it is
MOSTLY = 0.5  # share of the pairs of a size
END = 1e-4  # noise of the pair of all and none, in units of the others': its gap is the sum of the values


@dataclass(frozen=True)
class Odd:
    """Ridge regression of v(S) - v(complement) on the parities of one and of three players.

    Shapley values depend on the odd part of a game alone, and there a parity is shared equally by its players. The
    kernel of all triples is a polynomial of the inner product of two coalitions' signs, so thousands of them cost
    nothing, and how much they and the noise may explain is what is likeliest. Exact for games of order two, and for
    those of order four once there are enough pairs; else drawn towards 0 by the ridge. The noise is part of the game:
    a pair that was drawn stands for itself, so sizes that are enumerated are exact, and where half of a size or more
    is drawn, what the ridge without a pair leaves of it stands for the rest. Pairs are drawn as by 'leverage'.

    Standard errors are delete-one jackknife errors over the pairs, and the spread of what stands for the rest, but no
    less than the posterior's deviations with Student's factor for as many pairs: leaving out one of few does not show
    what the ridge has not seen. `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than players pairs (or all, if there are fewer). Source: Fumagalli,
    Butler, Kang, Ramchandran, Witter, An odd estimator for Shapley values (arXiv 2602.01399), here with every triple in
    place of picked interactions, by the kernel of Duvenaud, Nickisch, Rasmussen, Additive Gaussian processes (2011).
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        for drawn in ask_pairs("odd regression", game, budget, game.players, self.batch, rng):
            found = fit([drawn])
            yield Attribution(found.values, found.standard_errors, drawn.evaluations)


def fit(parts: Sequence[Drawn], shares: Sequence[float] = (1.0,), surrogate: Values | None = None) -> Fit:
    """The regression of the gaps, and of those of all and none, which are nearly exact; all parts have as many pairs.

    parts: pairs that were asked on disjoint parts of the samples, the game being the mean of theirs with these shares;
    surrogate: weights [players], finite and not all 0, of an additive game that resembles it, which is a regressor, and
    so is its cube.
    """
    players, count = parts[0].coalitions.shape[1], len(parts[0].gaps)
    signs = np.concatenate([*(drawn.signs for drawn in parts), np.ones((len(parts), players))])
    gaps = np.concatenate([*(drawn.gaps for drawn in parts), [drawn.total for drawn in parts]])
    seen = np.concatenate([drawn.seen for drawn in parts])
    jitter = np.append(np.ones(len(seen)), np.full(len(parts), END))
    part = np.append(np.repeat(np.arange(len(parts)), count), np.arange(len(parts)))
    games, of_players = _surrogates(signs, surrogate)
    inner, alike, same = signs @ signs.T, games @ games.T, part[:, None] == part

    def prior(rows: NDArray[np.int64], share: float, noise: float, apart: float) -> NDArray[np.float64]:
        some = np.ix_(rows, rows) if len(rows) < len(gaps) else np.s_[:, :]
        kernel = _parities(inner[some], players, share)
        if apart:
            kernel += apart * same[some] * (kernel + alike[some])
        kernel += LEVEL * alike[some]
        kernel[np.diag_indices(len(rows))] += noise * jitter[rows]
        return kernel

    every = np.arange(len(gaps))
    few = every[(every >= len(seen)) | (every % max(count, 1) < CHOOSE // len(parts))]
    share, noise, apart = _likeliest(functools.partial(prior, few), gaps[few], players, len(parts))
    factor, noise = factored(lambda noise: prior(every, share, noise, apart), noise)
    inverse = cho_solve((factor, True), np.eye(len(gaps)))
    dual = cho_solve((factor, True), gaps)
    own, known = _owners(signs, share), games @ of_players.T
    owner = own + LEVEL * known + apart * np.asarray(shares)[part][:, None] * (own + known)
    # the noise is part of the game: a pair that was drawn stands for itself with what the ridge leaves of it
    own_gaps = np.concatenate([*(drawn.owners for drawn in parts), np.full((len(parts), players), 1 / players)])
    owner += (noise * jitter * np.asarray(shares)[part])[:, None] * own_gaps
    solve = owner.T @ inverse
    values, left_out, variance = owner.T @ dual, (dual / np.diag(inverse))[: len(seen)], np.zeros(players)
    for k, drawn in enumerate(parts):
        # where most of a size were, each stands for the others, too, with what the ridge without it leaves
        of_part = np.s_[k * count : (k + 1) * count]
        others = np.where(drawn.seen >= MOSTLY, left_out[of_part], 0)
        missed, error = missed_by(drawn, np.zeros(count), others)
        values += shares[k] * missed
        variance += (shares[k] * error) ** 2
    alone, regressors = (1 - 2 / 3 * share) / players, (of_players**2).sum(axis=1)
    weight = np.square(shares).sum()
    unknown = alone + LEVEL * regressors + apart * weight * (alone + regressors)
    unknown += weight * noise * (parts[0].variance + END / players**2)
    unknown = np.maximum(unknown - (solve * owner.T).sum(axis=1), 0) * (seen < 1).any()  # or what rounding leaves
    least = student(len(gaps)) * np.sqrt(float(gaps @ dual) / len(gaps) * unknown)
    if surrogate is not None:  # what it misses of a player is a share of what it says, but the prior is for all alike
        size = np.abs(surrogate) / np.sqrt((surrogate**2).mean())
        least = np.maximum(least, size * np.sqrt((least**2).mean()))
    return Fit(
        values=values,
        left_out=left_out,
        solve=solve[:, : len(seen)],
        seen=seen,
        besides=np.sqrt(variance),
        least=least,
    )


def _likeliest(
    prior: Callable[[float, float, float], NDArray[np.float64]], gaps: Values, players: int, parts: int
) -> tuple[float, float, float]:
    """The share of triples, the noise, and what a part has to itself, under which the gaps are likeliest."""
    best = (-np.inf, 0.0, 0.0, APART[2] if parts > 1 else 0.0)
    for choice in product(SHARES if players > 2 else SHARES[:1], NOISES, best[3:]):
        best = max(best, (likelihood(prior(*choice), gaps), *choice))
    for apart in APART if parts > 1 else ():
        best = max(best, (likelihood(prior(*best[1:3], apart), gaps), *best[1:3], apart))
    return best[1:]


def _surrogates(signs: NDArray[np.float64], weights: Values | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gaps [rows, games] and Shapley values [players, games] of the additive game and of its cube, of size 1."""
    if weights is None:
        return np.zeros((len(signs), 0)), np.zeros((signs.shape[1], 0))
    weights = weights / np.abs(weights).max()
    gaps = signs @ weights
    # the cube of sum(w s) is the sum of w_i (3 q - 2 w_i^2) s_i, where q = sum(w^2), and of the triples' parities
    cubes = weights * (2 * (weights**2).sum() - weights**2 + (weights.sum() - weights) ** 2)
    games, values = np.stack([gaps, gaps**3], axis=1), np.stack([weights, cubes], axis=1)
    size = np.sqrt((games**2).mean(axis=0)) + 1e-300
    return games / size, values / size


def _parities(inner: NDArray[np.float64], players: int, share: float) -> NDArray[np.float64]:
    """Covariance of gaps from the inner products of their signs."""
    kernel: NDArray[np.float64] = (1 - share) / players * inner
    if share:
        kernel += share / _triples(float(players), players) * _triples(inner, players)
    return kernel


def _owners(signs: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Covariance of gaps with Shapley values, [rows, players]: a parity of three players gives each of them a third."""
    players = signs.shape[1]
    owner: NDArray[np.float64] = (1 - share) / players * signs
    if share:
        others = signs.sum(axis=1, keepdims=True) - signs
        pairs = (others**2 - (players - 1)) / 2  # sum of the products of two others
        owner += share / _triples(float(players), players) / 3 * signs * pairs
    return owner


def _triples(inner: Any, players: int) -> Any:
    """The sum over all triples of the products of their parities, from the sum over all players: Newton's identity."""
    return (inner**3 - (3 * players - 2) * inner) / 6


def factored(kernel: Callable[[float], NDArray[np.float64]], noise: float) -> tuple[NDArray[np.float64], float]:
    """Cholesky factor of kernel(noise), and the noise: raised where it was chosen by fewer rows, and is too small."""
    while True:
        try:
            return cholesky(kernel(noise), lower=True), noise
        except LinAlgError:
            noise *= 10


def likelihood(kernel: NDArray[np.float64], gaps: Values) -> float:
    """Of the gaps, their scale being the likeliest one."""
    try:
        factor = cholesky(kernel, lower=True)
    except LinAlgError:
        return -np.inf
    scale = float(gaps @ cho_solve((factor, True), gaps)) / len(gaps)
    return float(-0.5 * len(gaps) * np.log(max(scale, 1e-300)) - np.log(np.diag(factor)).sum())
