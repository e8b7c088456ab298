"""Shapley values as mean marginals along random permutations and their reverses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smpq_ext.core import Attribution, Game, ask, pay
from smpq_ext.estimators.permutation import marginals, standard_error

__all__ = ["Antithetic"]


@dataclass(frozen=True)
class Antithetic:
    """Mean of the marginals along each random permutation and its reverse; exact for games of order two.

    Unbiased; the halves of a pair depend on each other, so standard errors are over the pairs. `batch` is about how
    many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than two pairs. Source: Mitchell, Cooper, Frank, Holmes (JMLR
    2022), antithetic sampling.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of pairs; arrays [players]."""
        inner = 2 * (game.players - 1)  # coalitions of one pair, besides the empty and the full one that all share
        pay(budget, 2 + 2 * inner, game.players, "antithetic permutations")
        pairs = (budget - 2) // inner if inner else 2
        ends = ask(game, np.repeat([[False], [True]], game.players, axis=1))
        found = np.empty((0, game.players))
        while len(found) < pairs:
            count = min(max(self.batch // max(inner, 1), 2), pairs - len(found))
            ranks = rng.permuted(np.tile(np.arange(game.players), (count, 1)), axis=1)
            both = marginals(game, np.concatenate([ranks, game.players - 1 - ranks]), ends)
            found = np.concatenate([found, (both[:count] + both[count:]) / 2])
            yield Attribution(found.mean(axis=0), standard_error(found), 2 + len(found) * inner)
