"""Baseline: a random assignment that uses the budget up."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Problem
from smpq_ext.solvers.milp import Milp

__all__ = ["Random"]


class Random:
    """The solver's answer to a random score table in which more bits never do harm; another table for every seed."""

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        mask = problem.space.mask
        # Damage falls by a random amount from each candidate to the next.
        steps = problem.rng(1).exponential(size=mask.shape)
        damage = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
        return Answer(Milp()(np.where(mask, damage, np.inf), problem.budget))
