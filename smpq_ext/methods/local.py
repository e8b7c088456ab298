"""Baseline: local search by true evaluations, from the single-slot plan."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Problem
from smpq_ext.methods.single import score_singles
from smpq_ext.solvers.milp import Milp
from smpq_ext.surrogate import neighbours

__all__ = ["Local"]


class Local:
    """Measure random feasible exchanges of a few steps around the best plan so far, and move to whatever is better.

    It starts from the single-slot plan, uses all samples and every evaluation there is, and confirms nothing on others.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        evaluator, rng = problem.evaluator, problem.rng(1)
        scores = score_singles(problem, evaluator)
        spent = 1 + int(np.isfinite(scores.damage).sum()) - len(problem.space.slots)
        best = Milp()(scores.damage, problem.budget)
        if spent >= problem.evaluations:
            return Answer(best, scores.damage, scores.errors, float(scores.predict(best)[0]))
        loss = -float(evaluator(best[None])[0])
        spent += 1
        known = {best.tobytes()}
        while spent < problem.evaluations:
            pool = neighbours(best[None], problem.space, problem.budget, 256, rng)
            pool = pool[[row.tobytes() not in known for row in pool]][: min(8, problem.evaluations - spent)]
            if not len(pool):
                break
            known.update(row.tobytes() for row in pool)
            losses = -evaluator(pool)
            spent += len(pool)
            if losses.min() < loss:
                best, loss = pool[losses.argmin()], float(losses.min())
            problem.progress("local search", spent, problem.evaluations)
        return Answer(best, scores.damage, scores.errors, loss)
