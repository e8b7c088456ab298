"""Greedy along a list of signal-to-noise ratios, as in AIMET's automatic mixed precision."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Infeasible, Problem, TooFew
from smpq_ext.engine.losses import noise_to_signal
from smpq_ext.methods.single import singles

__all__ = ["Sqnr"]


class Sqnr:
    """Lower one slot at a time, the one that leaves the best signal-to-quantization-noise ratio at the output first.

    The ratio of every (slot, candidate) alone is measured once; then the list is walked from the best ratio down, and
    an entry is taken where it lowers a cost that is still over its limit, until the budget is met.

    Raises Infeasible where the walk ends above the budget.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        rows = singles(problem)
        if len(rows) > problem.evaluations:
            raise TooFew(f"evaluations: {problem.evaluations} are too few for one per candidate; it needs {len(rows)}")
        noise = -problem.record(problem.model.against_float(noise_to_signal))(rows)
        damage = np.where(problem.space.mask, 0.0, np.inf)
        entries = []
        for row, ratio in zip(rows[1:], noise[1:], strict=True):
            slot = int(np.flatnonzero(row != rows[0])[0])
            damage[slot, row[slot]] = ratio
            entries.append((float(ratio), slot, int(row[slot])))
        tied = {slot: group for group in problem.budget.tied for slot in group}
        assignment = problem.space.highest()
        for _, slot, candidate in sorted(entries):
            if problem.budget.feasible(assignment)[0]:
                break
            if candidate >= assignment[slot]:
                continue
            lowered = assignment.copy()
            lowered[list(tied.get(slot, (slot,)))] = candidate
            if any(
                limit.cost(assignment)[0] > limit.limit and limit.cost(lowered)[0] < limit.cost(assignment)[0]
                for limit in problem.budget.limits
            ):
                assignment = lowered
        if not problem.budget.feasible(assignment)[0]:
            raise Infeasible("budget: the greedy walk of sqnr does not reach it; raise it, or use another method")
        return Answer(assignment, damage, evaluations=len(rows))
