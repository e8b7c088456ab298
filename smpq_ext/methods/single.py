"""Each slot alone at each width, the others at their highest; the damages are added up (as MCT does)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Answer, Assignments, Evaluator, Problem, Table, TooFew
from smpq_ext.solvers.milp import Milp

__all__ = ["Single"]


@dataclass(frozen=True)
class Scores:
    """What one slot alone does to the loss: `damage` and `errors` [slots, candidates], and the loss without any."""

    damage: Table  # +inf where there is no candidate
    errors: Table
    base: float

    def predict(self, assignments: Assignments) -> NDArray[np.float64]:
        """The loss [n] if damages simply add up."""
        rows = np.atleast_2d(np.asarray(assignments, np.intp))
        return self.base + self.damage[np.arange(len(self.damage)), rows].sum(axis=1)


class Single:
    """Damage of (slot, candidate): loss with that slot alone at that width, minus loss with all at their highest.

    Tied slots are lowered one by one, and the solver adds their damages. Costs 1 + sum(candidates - 1) evaluations.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        scores = score_singles(problem, problem.evaluator)
        assignment = Milp()(scores.damage, problem.budget)
        return Answer(assignment, scores.damage, scores.errors, float(scores.predict(assignment)[0]))


def singles(problem: Problem) -> NDArray[np.int8]:
    """The assignments [1 + n, slots] to be measured: all highest first, then each slot alone at each lower width."""
    highest = problem.space.highest()
    rows = [highest]
    for slot, top in enumerate(highest):
        for candidate in range(top):
            row = highest.copy()
            row[slot] = candidate
            rows.append(row)
    return np.array(rows, np.int8)


def score_singles(problem: Problem, evaluator: Evaluator) -> Scores:
    """Measure the single-slot damages; errors from the spread over the groups of calibration samples."""
    rows = singles(problem)
    if len(rows) > problem.evaluations:
        raise TooFew(f"evaluations: {problem.evaluations} are too few to measure each slot alone; it needs {len(rows)}")
    values = []
    for start in range(0, len(rows), evaluator.rows_per_batch):
        values.append(evaluator.by_group(rows[start : start + evaluator.rows_per_batch]))
        problem.progress("single slots", min(start + evaluator.rows_per_batch, len(rows)), len(rows))
    loss = -np.concatenate(values)
    damage = np.where(problem.space.mask, 0.0, np.inf)
    errors = np.zeros_like(damage)
    for row, one in zip(rows[1:], loss[1:], strict=True):
        slot = int(np.flatnonzero(row != rows[0])[0])
        difference = one - loss[0]
        damage[slot, row[slot]] = difference @ evaluator.groups
        errors[slot, row[slot]] = standard_error(difference, evaluator.groups)
    return Scores(damage, errors, float(loss[0] @ evaluator.groups))


def standard_error(by_group: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
    """Standard error of the weighted mean of a value known for each group of samples, [groups]; infinite for one."""
    if len(shares) < 2:
        return math.inf
    deviation = by_group - by_group @ shares
    return float(np.sqrt((shares**2 * deviation**2).sum() * len(shares) / (len(shares) - 1)))
