"""Diagonal Fisher information, as in NVIDIA Model-Optimizer's auto_quantize: one gradient pass, no coalition."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Problem
from smpq_ext.engine.gradients import squared_gradients
from smpq_ext.solvers.milp import Milp

__all__ = ["Gradient"]


class Gradient:
    """Damage of (slot, candidate): 1/2 sum over samples and elements of (gradient * quantization error)^2.

    The gradient is the loss's at the float model; for weights it is squared per sub-batch of samples. Scores are in
    units of the loss only up to a factor; the solver needs no more.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        damage = np.where(problem.space.mask, 0.0, np.inf)
        damage[problem.space.mask] = squared_gradients(problem.model)[problem.space.mask]
        return Answer(Milp()(damage, problem.budget), damage)
