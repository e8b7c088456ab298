"""Baseline: the wrong way round, the most sensitive slots get the fewest bits."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Problem
from smpq_ext.methods.single import score_singles
from smpq_ext.solvers.milp import Milp

__all__ = ["Inverted"]


class Inverted:
    """Single-slot scores with the ranks of the slots reversed: the most sensitive slot gets the table of the least.

    The budget is used up as by the other methods, so a method that is no better than this one has learned nothing.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        scores = score_singles(problem, problem.evaluator)
        table = scores.damage.copy()
        kinds = np.array([s.kind for s in problem.space.slots])
        for kind in np.unique(kinds):  # weights among weights: their budgets may be apart
            slots = np.flatnonzero(kinds == kind)
            order = slots[np.argsort(scores.damage[slots, 0])]
            for slot, other in zip(order, order[::-1], strict=True):
                if len(problem.space.candidates[slot]) == len(problem.space.candidates[other]):
                    table[slot] = scores.damage[other]
        return Answer(Milp()(table, problem.budget))
