"""Hutchinson trace of the Hessian, as in HAWQ-V2 (Dong et al., 2020) and HAWQ-V3 (Yao et al., 2021)."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Problem
from smpq_ext.engine.gradients import hessian_scores
from smpq_ext.solvers.milp import Milp

__all__ = ["Hessian"]


class Hessian:
    """Damage of (slot, candidate): the slot's mean Hessian trace times its squared error (HAWQ-V2, eq. 11).

    The trace is Hutchinson's estimate with `probes` Rademacher vectors; negative estimates count as 0.
    """

    holdout = False

    def __init__(self, probes: int = 8) -> None:
        self.probes = probes

    def allocate(self, problem: Problem) -> Answer:
        damage = np.where(problem.space.mask, 0.0, np.inf)
        scores = hessian_scores(problem.model, self.probes, seed=problem.seed)
        damage[problem.space.mask] = scores[problem.space.mask]
        return Answer(Milp()(damage, problem.budget), damage)
