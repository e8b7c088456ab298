"""Shapley values by kernel regression on coalitions sampled by leverage scores, in complement pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Attribution, Coalitions, Game, SmpqError, Values

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
        players = game.players
        population = [comb(players, s) // (1 + (2 * s == players)) for s in range(1, players // 2 + 1)]  # pairs by size
        least = min(sum(population), 2 * players)
        if budget < 2 + 2 * least:
            raise SmpqError(
                f"evaluations: {budget} are too few for leverage regression of {players} players; "
                f"it needs {2 + 2 * least}"
            )
        pairs = min((budget - 2) // 2, sum(population))
        empty, full = game(np.repeat([[False], [True]], players, axis=1))
        draw = _pairs(players, population, rng)
        coalitions = np.empty((0, players), np.bool_)
        gaps = np.empty(0)
        while True:
            count = min(max(self.batch // 2, least if not len(gaps) else 1), pairs - len(gaps))
            if count:
                rows = np.array([next(draw) for _ in range(count)])
                values = game(np.concatenate([rows, ~rows]))
                coalitions = np.concatenate([coalitions, rows])
                gaps = np.concatenate([gaps, values[:count] - values[count:]])
            yield Attribution(*_regress(coalitions, gaps, float(full - empty), population), 2 + 2 * len(gaps))
            if len(gaps) == pairs:
                return


def _pairs(players: int, population: list[int], rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
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


def _regress(coalitions: Coalitions, gaps: Values, total: float, population: list[int]) -> tuple[Values, Values]:
    """Values and standard errors [players] from coalitions [pairs, players] and v(S) - v(complement) [pairs].

    Of a pair, the kernel regression sees only the difference: it is `signs @ values` for an additive game.
    """
    players = coalitions.shape[1]
    size = coalitions.sum(axis=1)
    drawn = np.bincount(size, minlength=len(population) + 1)
    seen = np.array([0.0] + [n / whole for n, whole in zip(drawn[1:], population, strict=True)])[size]
    # Shapley kernel 1/(C(n, s) s (n - s)) x pairs of that size / pairs drawn of that size
    weights = 1 / (size * (players - size) * drawn[size] * (1 + (2 * size == players)))
    signs = np.where(coalitions, 1.0, -1.0)
    targets = gaps - signs.sum(axis=1) * total / players
    signs -= signs.mean(axis=1, keepdims=True)  # what is left to fit sums to zero: the efficiency constraint

    eigenvalues, vectors = np.linalg.eigh((signs.T * weights) @ signs)
    good = eigenvalues > 1e-10 * eigenvalues[-1]
    inverse = (vectors[:, good] / eigenvalues[good]) @ vectors[:, good].T
    solve = inverse @ (signs.T * weights)  # [players, pairs]
    offsets = solve @ targets
    hat = np.einsum("pi,ip->p", signs, solve)
    if good.sum() < players - 1 or (hat[seen < 1] > 1 - 1e-9).any():
        errors = np.full(players, np.inf)  # without one of the pairs there would be no answer
    else:
        moved = solve * ((targets - signs @ offsets) / np.maximum(1 - hat, 1e-9))
        errors = np.sqrt((moved**2 * (1 - seen)).sum(axis=1))
    return total / players + offsets, errors
