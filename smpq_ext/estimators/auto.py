"""The estimator that suits the players, the budget and the game."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from smpq_ext.core import Attribution, Game, check
from smpq_ext.estimators import leverage, odd
from smpq_ext.estimators.control import Control
from smpq_ext.estimators.exact import MOST_PLAYERS, Exact
from smpq_ext.estimators.gaussian import Gaussian
from smpq_ext.estimators.leverage import ask_pairs

__all__ = ["Auto"]

FEW = 8  # evaluations for each player
CLEAR = 0.95  # of what 'leverage' misses: where 'odd' misses less


@dataclass(frozen=True)
class Auto:
    """All coalitions where the budget pays for them; 'control' where the game has parts or derivatives; else pairs.

    Below 8 x players evaluations these are those of 'gaussian'. From there on the regressions 'leverage' and 'odd'
    are fitted to the same pairs, and the second is taken where it predicts pairs that it has not seen better by a
    twentieth; where the game is noise beyond single players it does not, and the first has no bias. `reason` of an
    attribution says which, and why. `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget is too small for what it takes. Source: those of the estimators that it takes.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch; arrays [players]."""
        players = game.players
        check(budget, players)
        if players <= MOST_PLAYERS and budget >= 2**players:
            for step in Exact().steps(game, budget, rng):
                yield replace(step, reason=f"exact: {budget} evaluations pay for all {2**players} coalitions")
            return
        if hasattr(game, "derivatives") or hasattr(game, "parts"):
            yield from Control(batch=self.batch).steps(game, budget, rng)
            return
        if budget < FEW * players:
            for found in Gaussian(self.batch).steps(game, budget, rng):
                yield replace(
                    found, reason=f"gaussian: {budget} evaluations are fewer than {FEW} for each of {players} players"
                )
            return
        for drawn in ask_pairs("pairs", game, budget, 2 * players, self.batch, rng):
            fits = {"leverage": leverage.fit(drawn), "odd": odd.fit([drawn])}
            power = float(np.mean(drawn.gaps**2)) or 1.0
            missed = {name: float(np.mean(found.left_out**2)) / power for name, found in fits.items()}
            missed = {name: np.inf if np.isnan(share) else share for name, share in missed.items()}
            first, second = ("odd", "leverage") if missed["odd"] < CLEAR * missed["leverage"] else ("leverage", "odd")
            best = fits[first]
            reason = f"{first}: of pairs left out it misses {missed[first]:.2%}, {second} {missed[second]:.2%}"
            yield Attribution(best.values, best.standard_errors, drawn.evaluations, reason)
