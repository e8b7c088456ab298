"""Shapley values with surrogates as control variates, each coalition on a part of the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Attribution, Game, SmpqError, Values, check
from smpq_ext.estimators import odd
from smpq_ext.estimators.leverage import ask_pairs

__all__ = ["Control"]

MOST = 2000  # pairs that a regression may have: its time grows with their cube


@dataclass(frozen=True)
class Control:
    """Exact Shapley values of surrogates, scaled as the evaluations want it, plus 'odd' for what these miss.

    Surrogates: `points` backward passes, at Gauss-Legendre points of the line from the empty to the full coalition,
    tell how the value changes with the share of every player. Their mean, the Aumann-Shapley values, makes an additive
    game; its cube stands for a network that saturates. Both are regressors of v(S) - v(complement), where second-order
    surrogates cancel, beside the ridge of 'odd'. `weights` [players], where given, stand for the passes.

    Parts: where the value is a mean over groups of samples, every pair is asked on one group only, so that the same
    work sees many more coalitions: on as many parts as there are groups, and make no more than 2,000 pairs in all. What
    a group has to itself is as large as is likeliest. Each group counts for its share of an evaluation, a backward pass
    for one.

    A game tells these by `derivatives(points) -> [points, players]` and `parts(most) -> ((share, game), ...)`; without
    weights and both it is 'odd', and `reason` of an attribution says what there was. Standard errors are those of
    'odd'; the posterior's deviation of a player is no smaller than its share of what the surrogate says. `batch` is
    about how many coalitions a part is asked at once.

    Raises SmpqError where the budget pays for fewer than players // 2 + 1 pairs in all (or all, if there are fewer),
    or weights are not one for each player. Source: Aumann and Shapley, Values of non-atomic games (1974); Shoemaker,
    Principles and procedures of multiple matrix sampling (1973); Swersky, Snoek, Adams, Multi-task Bayesian
    optimization (NIPS 2013), whose tasks are the groups here.
    """

    points: int = 1
    weights: Values | None = None
    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        check(budget, game.players)
        weights = None if self.weights is None else np.asarray(self.weights, np.float64)
        if weights is not None and weights.shape != (game.players,):
            raise SmpqError(f"weights: one for each of {game.players} players, not {list(weights.shape)}")
        tell = None if weights is not None else getattr(game, "derivatives", None)
        passes = 0 if tell is None else self.points
        most = max(1, MOST // max(budget // 2, 1))
        shares, parts = zip(*(game.parts(most) if hasattr(game, "parts") else [(1.0, game)]), strict=True)
        least = -(-(game.players // 2 + 1) // len(parts))
        streams = rng.spawn(len(parts)) if len(parts) > 1 else [rng]
        pairs = [
            ask_pairs("control variates", part, budget, least, self.batch, stream, besides=passes)
            for part, stream in zip(parts, streams, strict=True)
        ]
        for drawn in zip(*pairs, strict=True):
            if tell is not None and weights is None:
                weights = aumann_shapley(tell, self.points)
            useful = weights is not None and bool(np.isfinite(weights).all() and weights.any())
            helps = [f"pairs on {len(parts)} parts of the samples"] if len(parts) > 1 else []
            helps += ["surrogates from " + ("derivatives" if passes else "given weights")] if useful else []
            found = odd.fit(drawn, shares, weights if useful else None)
            reason = f"control: {' and '.join(helps) or 'neither parts nor surrogates, as odd'}"
            yield Attribution(found.values, found.standard_errors, passes + drawn[0].evaluations, reason)


def aumann_shapley(derivatives: Callable[[Values], NDArray[np.float64]], points: int) -> Values:
    """The mean derivative on the line from the empty to the full coalition, [players]."""
    places, shares = np.polynomial.legendre.leggauss(points)
    return np.asarray(shares / 2 @ derivatives((places + 1) / 2), np.float64)
