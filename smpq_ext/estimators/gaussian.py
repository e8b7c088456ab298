"""Shapley values of a Gaussian process over coalitions, for few evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve
from scipy.special import softmax
from scipy.stats import hypergeom

from smpq_ext.core import Attribution, Game, Values
from smpq_ext.estimators.leverage import Drawn, ask_pairs, draw_pairs, fit, student
from smpq_ext.estimators.odd import END, factored, likelihood

__all__ = ["Gaussian"]

SHARES = (0.0, 0.05, 0.2, 0.5, 0.9)  # of the prior variance that is not additive
AGREEMENTS = (0.5, 0.8, 0.95)  # correlation of what is not additive where two coalitions differ in a player
NOISES = (1e-10, 1e-4, 1e-2)
CHOOSE = 300  # so many pairs tell which of them it is
UNLIKELY = 1e-3  # of the likeliest one's likelihood: such priors do not count


@dataclass(frozen=True)
class Gaussian:
    """Posterior mean and deviation of the Shapley values under a Gaussian process, from pairs in a fixed order.

    First none and all, then every single player with all others, then random halves, each with its complement. The
    prior of a pair's gap v(S) - v(complement) is additive plus the odd part of a kernel agreement^(players that
    differ), which holds interactions of every order. Values are those under the likeliest shares; the squares of
    deviations from them are averaged over all by likelihood, with Student's factor for as many pairs. 'auto' takes it
    for few evaluations; the time grows with the cube of these. `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget is too small, and names the least. Source: Rasmussen and Williams, Gaussian
    processes for machine learning (2006), section 2.2; its Shapley values are exact sums over the kernel.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        least = game.players // 2 + 1
        for drawn in ask_pairs("a Gaussian process", game, budget, least, self.batch, rng, _order):
            if len(drawn.gaps) < sum(drawn.population):
                found = _posterior(drawn)
            else:
                found = fit(drawn).values, np.zeros(game.players)  # all pairs: exact
            yield Attribution(*found, drawn.evaluations)


def _order(players: int, pairs: list[int], rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """One coalition of each pair: the singles, as many random halves, and then as 'leverage' draws them."""

    def candidates() -> Iterator[NDArray[np.bool_]]:
        yield from np.eye(players, dtype=np.bool_)[: pairs[0] if pairs else 0]
        for _ in range(players):
            half = np.zeros(players, np.bool_)
            half[rng.permutation(players)[: players // 2]] = True
            yield ~half if 2 * half.sum() == players and not half[0] else half
        yield from draw_pairs(players, pairs, rng)

    seen: set[bytes] = set()
    for row in candidates():
        if row.tobytes() not in seen:
            seen.add(row.tobytes())
            yield row


def _posterior(drawn: Drawn) -> tuple[Values, Values]:
    """Mean under the likeliest prior and deviation from it under all, [players], given the gaps, also of all and none.

    Few gaps hardly tell which prior it is; each counts for its likelihood.
    """
    players = drawn.coalitions.shape[1]
    rows = np.concatenate([drawn.coalitions, np.ones((1, players), np.bool_)])
    targets = np.append(drawn.gaps, drawn.total)
    signs = np.where(rows, 1.0, -1.0)
    inner, size = signs @ signs.T, rows.sum(axis=1)
    jitter = np.append(np.ones(len(drawn.gaps)), END)

    def covariance(share: float, agreement: float, noise: float, some: NDArray[np.int64]) -> NDArray[np.float64]:
        return _kernel(inner[np.ix_(some, some)], players, share, agreement) + np.diag(noise * jitter[some])

    every = np.arange(len(targets))
    some = np.append(every[:-1][:CHOOSE], every[-1])
    choices = [c for c in product(SHARES, AGREEMENTS, NOISES) if c[0] or c[1] == AGREEMENTS[0]]
    likely = np.array([likelihood(covariance(*choice, some), targets[some]) for choice in choices])
    kept = np.flatnonzero(likely >= likely.max() + np.log(UNLIKELY))
    means, variances = [], []
    for share, agreement, noise in (choices[i] for i in kept):
        factor, _ = factored(partial(covariance, share, agreement, some=every), noise)
        dual = cho_solve((factor, True), targets)
        shared = np.array([_share(players, int(s), agreement) for s in size])  # [rows, 2]: of players outside, inside
        cross = (1 - share) / players * signs + share * np.where(rows, shared[:, 1:], shared[:, :1])
        values = cross.T @ dual
        known = np.einsum("pi,pi->i", cross, cho_solve((factor, True), cross))
        unknown = np.maximum((1 - share) / players + share * _variance(players, agreement) - known, 0)
        means.append(values + (drawn.total - values.sum()) / players)
        variances.append(unknown * float(targets @ dual) / len(targets) * student(len(targets)) ** 2)
    best = means[int(likely[kept].argmax())]
    apart = np.array(variances) + (np.array(means) - best) ** 2
    return best, np.sqrt(softmax(likely[kept]) @ apart)


def _kernel(inner: NDArray[np.float64], players: int, share: float, agreement: float) -> NDArray[np.float64]:
    """Covariance of gaps, 1 on the diagonal, from the inner products of the signs of their coalitions."""
    apart = (players - inner) / 2  # how many players differ
    odd = (agreement**apart - agreement ** (players - apart)) / (1 - agreement**players)
    return np.asarray((1 - share) / players * inner + share * odd, np.float64)


@lru_cache(maxsize=4096)
def _share(players: int, size: int, agreement: float) -> tuple[float, float]:
    """Covariance of the Shapley value of a player outside, or inside, of a coalition of `size` with its gap.

    It is the Shapley value in the game that the odd kernel is as a function of its first argument.
    """
    found = []
    for inside in (False, True):
        with_ = np.arange(size - inside + 1)[:, None]  # how many others of the coalition have joined before
        without = np.arange(players - size - (not inside) + 1)[None]
        if not with_.size or not without.size:
            found.append(0.0)
            continue
        ways = [
            [
                comb(int(with_[-1, 0]), a) * comb(int(without[0, -1]), b) / comb(players - 1, a + b)
                for b in without[0].tolist()
            ]
            for a in with_[:, 0].tolist()
        ]
        before = size - with_ + without
        after = before + (-1 if inside else 1)
        moved = [agreement**d - agreement ** (players - d) for d in (before, after)]
        found.append(float((np.array(ways) * (moved[1] - moved[0])).sum()) / players / 2 / (1 - agreement**players))
    return found[0], found[1]


@lru_cache(maxsize=256)
def _variance(players: int, agreement: float) -> float:
    """Prior variance of a Shapley value of what is not additive, where that of a gap is 1."""
    others = players - 1
    s, t, both = np.meshgrid(*[np.arange(players)] * 3, indexing="ij")
    chance = hypergeom.pmf(both, others, s, t)  # that coalitions of s and t of the others have `both` in common
    alike = (chance * agreement ** np.maximum(s + t - 2 * both, 0)).sum()
    return float(2 * (1 - agreement) * alike / players**2 / (2 * (1 - agreement**players)))
