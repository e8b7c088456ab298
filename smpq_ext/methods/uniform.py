"""Baseline: the same width everywhere."""

from __future__ import annotations

import numpy as np

from smpq_ext.core import Answer, Infeasible, Problem

__all__ = ["Uniform"]


class Uniform:
    """The largest width that fits the budget when every slot takes it; a slot without that width takes its next lower.

    Weights and activations may differ where the budget limits only one of them: then all assignments of one width for
    weights and one for activations are tried, and the one with the most bits is taken.

    Raises Infeasible where not even the lowest widths fit.
    """

    holdout = False

    def allocate(self, problem: Problem) -> Answer:
        space = problem.space
        widths = sorted({w for c in space.candidates for w in c})
        kind = np.array([s.kind == "weight" for s in space.slots])
        rows = [
            [
                sum(w <= (for_weights if is_weight else for_activations) for w in c[1:])
                for c, is_weight in zip(space.candidates, kind, strict=True)
            ]
            for for_weights in widths
            for for_activations in widths
        ]
        assignments = np.unique(np.array(rows, np.int8), axis=0)
        assignments = assignments[problem.budget.feasible(assignments)]
        if not len(assignments):
            raise Infeasible("budget: not even the lowest width everywhere fits it")
        bits = np.nan_to_num(space.widths)[np.arange(len(space.slots)), assignments].sum(axis=1)
        balance = [len(set(row[kind])) + len(set(row[~kind])) for row in assignments]
        return Answer(assignments[np.lexsort((balance, -bits))[0]])
