"""Shapley values of a linear regression, corrected by what it misses of the coalitions that were sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smpq_ext.core import Attribution, Game, Values
from smpq_ext.estimators.leverage import Drawn, ask_pairs, fit

__all__ = ["Adjusted"]


@dataclass(frozen=True)
class Adjusted:
    """Leverage regression plus the Monte Carlo estimate of the Shapley values of its residuals; nearly unbiased.

    Pairs are drawn as by 'leverage'. A residual is that of the regression without the pair, so that no pair judges a
    fit that it has shaped; every residual informs all players. Standard errors come from the spread of the residuals'
    contributions within each size. `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than 2 x players pairs (or all, if there are fewer). Source:
    Witter, Liu, Musco, Regression-adjusted Monte Carlo estimators for Shapley values (2025).
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        for drawn in ask_pairs("regression-adjusted sampling", game, budget, 2 * game.players, self.batch, rng):
            found = fit(drawn)
            missed, errors = missed_by(drawn, drawn.gaps - drawn.signs @ found.values, found.left_out)
            yield Attribution(found.values + missed, errors, drawn.evaluations)


def missed_by(drawn: Drawn, residuals: Values, left_out: Values) -> tuple[Values, Values]:
    """Shapley values [players] of the game of which a pair's gap is its residual, and their standard errors.

    A pair of size s gives gap / s to the players of its smaller coalition and -gap / (n - s) to the others, averaged
    over each size. A pair that was drawn stands for itself with its residual, and for those not drawn with the one
    that it has when it is left out.
    """
    players = drawn.coalitions.shape[1]
    size, means = drawn.coalitions.sum(axis=1), drawn.means
    seen = drawn.seen[:, None]
    values, variance = np.zeros(players), np.zeros(players)
    for s in np.unique(size):
        of_size = size == s
        count = int(of_size.sum())
        own, others = (means[of_size] * missed[of_size][:, None] for missed in (residuals, left_out))
        whole = seen[of_size]
        values += (whole * own + (1 - whole) * np.nan_to_num(others)).mean(axis=0)
        if whole[0, 0] < 1 and (others != 0).any():
            certain = count > 1 and not np.isnan(others).any()
            variance += (1 - whole[0, 0]) * others.var(axis=0, ddof=1) / count if certain else np.inf
    return values, np.sqrt(variance)
