"""Exact Shapley values, from all coalitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np

from smpq_ext.core import Attribution, Game, SmpqError, ask, pay

__all__ = ["Exact"]

MOST_PLAYERS = 16


@dataclass(frozen=True)
class Exact:
    """Shapley values from all 2^players coalitions; standard errors are 0.

    Raises SmpqError beyond 16 players, and where the budget is below 2^players. Source: Shapley, A value for n-person
    games (1953).
    """

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """One attribution; arrays [players]."""
        players = game.players
        if players > MOST_PLAYERS:
            raise SmpqError(
                f"exact: {players} players are too many, at most {MOST_PLAYERS}; take 'antithetic' or 'leverage'"
            )
        pay(budget, 2**players, players, "exact values")
        coalitions = (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(np.bool_)
        values = ask(game, coalitions)
        # a coalition of size s enters with +1/(s C(n, s)) for its members and -1/((n - s) C(n, s)) for the others
        size = coalitions.sum(axis=1, keepdims=True)
        count = np.array([comb(players, s) for s in range(players + 1)], np.float64)[size]
        weights = np.where(coalitions, 1 / (np.maximum(size, 1) * count), -1 / (np.maximum(players - size, 1) * count))
        yield Attribution((values - values[0]) @ weights, np.zeros(players), len(values))
