"""The dynamic programme over the Pareto front of damage and cost; exact without rounding the costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Assignments, Budget, SmpqError, Table
from smpq_ext.solvers.milp import check, infeasible

__all__ = ["Dp"]


@dataclass(frozen=True)
class Dp:
    """Least damage under one additive limit; among equals the cheaper, then always the same one.

    Slot by slot it keeps the partial assignments that no other beats in both damage and cost. Costs may be any
    numbers.

    Raises Infeasible; SmpqError with several limits, products or pairs (the solver 'milp' takes those), and where the
    table has a NaN. Source: Nemhauser and Ullmann (Management Science 1969).
    """

    def __call__(self, table: Table, budget: Budget, pairwise: NDArray[np.float64] | None = None) -> Assignments:
        """The assignment [slots] of least damage."""
        allowed = check(table)
        if len(budget.limits) > 1 or any(limit.products for limit in budget.limits) or pairwise is not None:
            raise SmpqError("dp: takes one additive limit, no products such as bitops and no pairs; take solver 'milp'")
        slots = len(table)
        parent = budget.leaders(slots)
        units = np.unique(parent)
        member = (units[:, None] == parent).astype(np.float64)  # [units, slots]
        # +inf marks what is not allowed; it stays when tied slots are summed
        damage = np.stack([table[row > 0].sum(axis=0) for row in member])
        cost = np.zeros_like(damage)
        room = np.inf
        for limit in budget.limits:
            cost = member @ np.where(allowed, limit.table, 0)
            room = limit.limit * (1 + 1e-9) + 1e-9 - limit.constant
        options = [np.flatnonzero(np.isfinite(row)) for row in damage]
        if not all(len(o) for o in options):
            raise infeasible(budget, allowed)

        cheapest = np.array([c[o].min() for c, o in zip(cost, options, strict=True)])
        rest = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0)  # what the later units cost at least
        total, spent = np.zeros(1), np.zeros(1)
        steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # per unit: state that it came from, candidate
        for unit, choice in enumerate(options):
            new_total = (total[:, None] + damage[unit, choice]).ravel()
            new_spent = (spent[:, None] + cost[unit, choice]).ravel()
            order = np.lexsort((new_total, new_spent))
            order = order[new_spent[order] + rest[unit] <= room]
            if not len(order):
                raise infeasible(budget, allowed)
            best = np.minimum.accumulate(new_total[order])
            order = order[np.append(True, best[1:] < best[:-1])]
            total, spent = new_total[order], new_spent[order]
            steps.append((order // len(choice), choice[order % len(choice)]))

        state = len(total) - 1  # the front falls in damage, so its last state is the best
        chosen = np.zeros(len(units), np.int8)
        for unit in range(len(units) - 1, -1, -1):
            came_from, candidate = steps[unit]
            chosen[unit] = candidate[state]
            state = came_from[state]
        return chosen[np.searchsorted(units, parent)]
