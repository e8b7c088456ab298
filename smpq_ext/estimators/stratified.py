"""Shapley values from means over strata: one for every player, size, and side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Attribution, Coalitions, Game, Values, ask, pay

__all__ = ["Stratified"]


@dataclass(frozen=True)
class Stratified:
    """The mean value with a player minus the mean value without, over coalitions of each size, averaged over sizes.

    Every coalition is a sample in one stratum of each player. The empty one, the full one, and those that have or lack
    a single player are all asked; the others are drawn without replacement, evenly over the sizes, first so that every
    stratum has a sample. What the values miss of v(all) - v(none) is shared equally. Standard errors come from the
    spread in the strata, infinite where one has a single sample; `batch` is about how many coalitions are asked at
    once.

    Raises SmpqError where the budget does not pay for a sample in every stratum. Source: Kolpaczki, Bengs, Muschalik,
    Hüllermeier, Approximating the Shapley value without marginal contributions (AAAI 2024), algorithm Stratified SVARM.
    """

    batch: int = 256

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch; arrays [players]."""
        players = game.players
        border = _border(players)
        population = {s: comb(players, s) for s in range(2, players - 1)}
        first = [row for s in population for row in _cover(players, s, rng)]
        least = len(border) + len(first)
        pay(budget, least, players, "strata")
        coalitions = np.concatenate([border, np.array(first, np.bool_).reshape(-1, players)])
        values = ask(game, coalitions)
        seen = {row.tobytes() for row in coalitions}
        drawn = dict.fromkeys(population, 0)
        for row in first:
            drawn[int(row.sum())] += 1
        while True:
            yield Attribution(*_means(coalitions, values), len(values))
            count = min(self.batch, budget - len(values), sum(population.values()) - sum(drawn.values()))
            if count < 1:
                return
            rows = np.array([_next(players, population, drawn, seen, rng) for _ in range(count)])
            coalitions, values = np.concatenate([coalitions, rows]), np.concatenate([values, ask(game, rows)])


def _border(players: int) -> Coalitions:
    """The coalitions of none, one, all but one, and all players, each once."""
    one = np.eye(players, dtype=np.bool_)
    rows = np.concatenate([np.zeros((1, players), np.bool_), one, ~one, np.ones((1, players), np.bool_)])
    return np.unique(rows, axis=0)


def _cover(players: int, size: int, rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Coalitions of a size such that every player is in one and outside of one: runs of a random order."""
    run = min(size, players - size)
    order = rng.permutation(players)
    found = []
    for start in range(0, players, run):
        row = np.zeros(players, np.bool_)
        row[np.take(order, np.arange(start, start + run), mode="wrap")] = True
        found.append(row if run == size else ~row)
    return found


def _next(
    players: int, population: dict[int, int], drawn: dict[int, int], seen: set[bytes], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """A coalition that is not seen, of the size with the fewest drawn that has one."""
    size = min((s for s in population if drawn[s] < population[s]), key=lambda s: drawn[s])
    while True:
        row = np.zeros(players, np.bool_)
        row[rng.permutation(players)[:size]] = True
        if row.tobytes() not in seen:
            seen.add(row.tobytes())
            drawn[size] += 1
            return row


def _means(coalitions: Coalitions, values: Values) -> tuple[Values, Values]:
    """Values and standard errors [players] from coalitions [n, players] and their values [n]."""
    players = coalitions.shape[1]
    size = coalitions.sum(axis=1)
    found, moved, certain = np.zeros(players), np.zeros_like(coalitions, np.float64), np.ones(players, np.bool_)
    for s in range(players + 1):
        rows = np.flatnonzero(size == s)
        inside, given = coalitions[rows], values[rows][:, None]
        for members, whole, sign in (
            (inside, comb(players - 1, s - 1) if s else 0, 1),
            (~inside, comb(players - 1, s), -1),
        ):
            count = members.sum(axis=0)
            if not count.any():
                continue
            mean = (members * given).sum(axis=0) / count
            found += sign * mean / players
            # of a stratum that is partly drawn, what a sample moves the mean by, for the variance of the mean
            unseen = np.sqrt((1 - count / whole) * count / np.maximum(count - 1, 1))
            moved[rows] += sign * members * (given - mean) * unseen / count / players
            certain &= (count > 1) | (count == whole)
    moved -= moved.mean(axis=1, keepdims=True)
    errors = np.where(certain, np.sqrt((moved**2).sum(axis=0)), np.inf)
    total = float(values[size == players][0] - values[size == 0][0])
    return found + (total - found.sum()) / players, errors
