"""Shapley values as mean marginals along random permutations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Attribution, Game, Values, ask, pay
from smpq_ext.estimators.leverage import student

__all__ = ["Permutation"]


@dataclass(frozen=True)
class Permutation:
    """Mean of the marginals along random permutations; unbiased, standard errors by `standard_error` over them.

    `batch` is about how many coalitions are asked at once.

    Raises SmpqError where the budget pays for fewer than two permutations. Source: Castro, Gómez, Tejada (Computers &
    Operations Research 2009), algorithm ApproShapley.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of permutations; arrays [players]."""
        inner = game.players - 1  # coalitions of one permutation, besides the empty and the full one that all share
        pay(budget, 2 + 2 * inner, game.players, "permutations")
        runs = (budget - 2) // inner if inner else 2
        ends = ask(game, np.repeat([[False], [True]], game.players, axis=1))
        found = np.empty((0, game.players))
        while len(found) < runs:
            count = min(max(self.batch // max(inner, 1), 2), runs - len(found))
            ranks = rng.permuted(np.tile(np.arange(game.players), (count, 1)), axis=1)
            found = np.concatenate([found, marginals(game, ranks, ends)])
            yield Attribution(found.mean(axis=0), standard_error(found), 2 + len(found) * inner)


def standard_error(found: NDArray[np.float64]) -> Values:
    """Of the mean of independent estimates [runs, players]; of few, it is widened by Student's factor at 95 %.

    Where all estimates of a player agree, they may by chance: it gets the root mean square of the others' spreads.
    """
    runs = len(found)
    spread = found.std(axis=0, ddof=1)
    agree = np.ptp(found, axis=0) <= 1e-9 * np.abs(found).max()
    if not agree.all():
        spread = np.where(agree, np.sqrt((spread[~agree] ** 2).mean()), spread)
    return np.asarray(student(runs - 1) * spread / np.sqrt(runs), np.float64)


def marginals(game: Game, ranks: NDArray[np.int64], ends: Values) -> NDArray[np.float64]:
    """What each player adds when it joins, [runs, players], all runs in one call of the game.

    `ranks` [runs, players] tells when a player joins; `ends` are the values of the empty and the full coalition.
    """
    runs, players = ranks.shape
    path = np.empty((runs, players + 1))
    path[:, 0], path[:, -1] = ends
    if players > 1:
        prefixes = ranks[:, None, :] < np.arange(1, players)[:, None]
        path[:, 1:-1] = ask(game, prefixes.reshape(-1, players)).reshape(runs, -1)
    return np.take_along_axis(np.diff(path, axis=1), ranks, axis=1)
