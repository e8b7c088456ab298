"""SMPQ's sampler: permutations from the full set downwards, cut off where the accuracy has collapsed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smpq_ext.core import Attribution, Game, SmpqError, ask, pay
from smpq_ext.estimators.permutation import standard_error

__all__ = ["Truncated"]


@dataclass(frozen=True)
class Truncated:
    """Mean marginals of removing players in random order until the value falls below `threshold` x the full value.

    The players that are left in a permutation then get 0. That biases the values, and more permutations do not cure
    it; standard errors are over the permutations and say nothing of the bias. The value must be positive, such as an
    accuracy. `permutations` ends the sampling early (the paper's reference takes 10); `batch` permutations advance
    together, so a call asks at most so many coalitions.

    Raises SmpqError where the budget cannot pay for two whole permutations or the full value is not positive. Source:
    SMPQ (arXiv 2508.03002); the rule is that of Shapley-NAS (arXiv 2206.09811).
    """

    threshold: float = 0.5
    permutations: int | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise SmpqError(f"threshold: must be at least 0 and below 1, not {self.threshold}")
        if self.permutations is not None and self.permutations < 2:
            raise SmpqError(f"permutations: at least 2 are needed for a standard error, not {self.permutations}")

    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """An attribution after every batch of permutations; arrays [players]."""
        players = game.players
        pay(budget, 1 + 2 * players, players, "truncated permutations")
        full = float(ask(game, np.ones((1, players), np.bool_))[0])
        if not full > 0:
            raise SmpqError(f"truncated: needs a positive value such as accuracy, the full set has {full:g}")
        spent = 1
        found = np.empty((0, players))
        while True:
            count = min(max(self.batch, 2), (budget - spent) // players)  # no permutation may run out of budget
            if self.permutations is not None:
                count = min(count, self.permutations - len(found))
            if count < 1:
                return
            orders = rng.permuted(np.tile(np.arange(players), (count, 1)), axis=1)
            ranks = orders.argsort(axis=1)
            marginals = np.zeros((count, players))
            before = np.full(count, full)
            alive = np.arange(count)
            for step in range(players):
                after = ask(game, ranks[alive] > step)
                spent += len(alive)
                marginals[alive, orders[alive, step]] = before[alive] - after
                before[alive] = after
                alive = alive[after >= self.threshold * full]
                if not len(alive):
                    break
            found = np.concatenate([found, marginals])
            yield Attribution(found.mean(axis=0), standard_error(found), spent)
