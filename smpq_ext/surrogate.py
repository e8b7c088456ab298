"""A Gaussian process over assignments: what single-slot scores predict, corrected by what was measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular

from smpq_ext.core import Assignments, Budget, Space, Values

# Share of the additive part, length of the product part, noise: what the kernel is chosen from, by likelihood.
GRID = ((0.2, 0.5, 0.8), (0.1, 0.3, 1.0), (0.003, 0.03, 0.2))


class Surrogate:
    """Predicts the logarithm of the loss increase of assignments [n, slots] from measured ones.

    Mean: a line through the logarithm of the additive prediction, so that damages that add up super- or sub-additively
    by a power are no surprise. Kernel: one correction for every (slot, candidate), and a product over slots, exp(-share
    of differing slots / length), for interactions of any order. The weights of the parts are those of highest
    likelihood on a small grid.
    """

    def __init__(self, space: Space, predict: Callable[[Assignments], Values], base: float) -> None:
        self.space = space
        self.predict = predict
        self.base = base
        self._chosen_at = 0  # how many rows there were when the kernel was chosen
        self.settings = GRID[0][0], GRID[1][0], GRID[2][0]

    def fit(self, rows: Assignments, losses: Values) -> None:
        """Learn from measured losses [n] of assignments [n, slots]."""
        increase = losses - self.base
        self.floor = 0.02 * float(np.median(np.abs(increase))) + 1e-12
        target = self._log(increase)
        line = self._line(rows)
        # Ridge towards slope 1: with few points, trust the scores.
        penalty = np.diag([1e-9, 1.0])
        self.coefficients = np.linalg.solve(line.T @ line + penalty, line.T @ target + penalty @ [0.0, 1.0])
        residual = target - line @ self.coefficients
        self.rows = rows
        matches = self._matches(rows, rows)
        settings = [self.settings] if len(rows) < 1.3 * self._chosen_at else list(product(*GRID))
        best = -np.inf
        for additive, length, noise in settings:
            kernel = self._kernel(matches, additive, length)
            factor = cholesky(kernel + noise * np.eye(len(rows)), lower=True)
            solved = cho_solve((factor, True), residual)
            variance = float(residual @ solved) / len(rows) + 1e-15  # profiled out of the likelihood
            likelihood = -0.5 * len(rows) * np.log(variance) - np.log(np.diag(factor)).sum()
            if likelihood > best:
                best, self.scale = likelihood, variance
                self.settings, self.factor, self.solved = (additive, length, noise), factor, solved
        if len(settings) > 1:
            self._chosen_at = len(rows)

    def sample(self, rows: Assignments, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draws [count, n] from the posterior of the log increase of assignments [n, slots], each one function."""
        mean, cross = self._posterior(rows)
        reduced = solve_triangular(self.factor, cross.T, lower=True)
        covariance = self._kernel(self._matches(rows, rows), *self.settings[:2]) - reduced.T @ reduced
        covariance[np.diag_indices(len(rows))] += 1e-6
        factor = cholesky(self.scale * covariance + 1e-12 * np.eye(len(rows)), lower=True)
        return np.asarray(mean + rng.standard_normal((count, len(rows))) @ factor.T)

    def _posterior(self, rows: Assignments) -> tuple[Values, NDArray[np.float64]]:
        cross = self._kernel(self._matches(rows, self.rows), *self.settings[:2])
        return self._line(rows) @ self.coefficients + cross @ self.solved, cross

    def _log(self, increase: Values) -> Values:
        return np.asarray(np.log(np.maximum(increase, 0.0) + self.floor))

    def _line(self, rows: Assignments) -> NDArray[np.float64]:
        return np.stack([np.ones(len(rows)), self._log(self.predict(rows) - self.base)], axis=1)

    def _matches(self, a: Assignments, b: Assignments) -> NDArray[np.float64]:
        """Share of slots in which two assignments agree, [len(a), len(b)]."""
        flat = [self.space.one_hot(rows).reshape(len(rows), -1) for rows in (a, b)]
        return np.asarray(flat[0] @ flat[1].T, np.float64) / len(self.space.slots)

    @staticmethod
    def _kernel(matches: NDArray[np.float64], additive: float, length: float) -> NDArray[np.float64]:
        return additive * matches + (1 - additive) * np.exp((matches - 1) / length)


def neighbours(rows: Assignments, space: Space, budget: Budget, count: int, rng: np.random.Generator) -> Assignments:
    """Up to `count` distinct feasible assignments, each a few steps up and down from one of `rows` [n, slots]."""
    highest = space.highest()
    tries = 8 * count
    new = rows[rng.integers(len(rows), size=tries)]  # a few steps beyond the ends still fit in int8
    for step in (1, -1):
        moves = rng.integers(0 if step > 0 else 1, 4, size=tries)
        for k in range(3):
            slot = rng.integers(len(highest), size=tries)
            new[np.arange(tries), slot] += step * (k < moves)
    new = np.clip(new, np.int8(0), highest)[:, budget.leaders(len(highest))]
    new = np.unique(new[budget.feasible(new)], axis=0)
    return np.asarray(rng.permutation(new)[:count])
