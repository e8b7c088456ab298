"""Simulated annealing with single and pair moves, for score tables with many pairwise terms."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Assignments, Budget, Product, Table
from smpq_ext.solvers.milp import Milp, check, infeasible, pair_terms

__all__ = ["Anneal"]

FEW = 20_000  # so many assignments are enumerated instead


@dataclass(frozen=True)
class Anneal:
    """Low damage under any number of limits, products and ties, with any number of pairs; the least is not proven.

    `chains` start at the least damage without pairs and walk `steps` moves for each slot (or tied group), one or two
    of them at a time, while it gets colder; from the best that they saw it goes down by single and pair moves until
    none helps. Without pairs, and where there are at most 20,000 assignments, the answer is exact. Equal instances
    give equal answers. `pairwise` is as for the solver 'milp', which proves the least for a few dozen pairs.

    Raises Infeasible; SmpqError where the table has a NaN. Source: Kirkpatrick, Gelatt, Vecchi (Science 1983).
    """

    steps: int = 50
    chains: int = 32
    seed: int = 0

    def __call__(self, table: Table, budget: Budget, pairwise: NDArray[np.float64] | None = None) -> Assignments:
        """The assignment [slots] of lowest damage that was found."""
        allowed = check(table)
        terms = [] if pairwise is None else pair_terms(pairwise, allowed)
        if not terms:
            return Milp()(table, budget)
        problem = _Units(table, budget, terms, allowed)
        if math.prod(len(options) for options in problem.options) <= FEW:
            every = np.array(list(itertools.product(*problem.options)), np.int8).reshape(-1, len(problem.options))
            every = every[problem.feasible(every)]
            if not len(every):
                raise infeasible(budget, allowed)
            return problem.slots(every[problem.damage(every).argmin()])
        start = Milp()(np.where(allowed, table, np.inf), budget)[problem.first]
        return problem.slots(_descend(problem, self._walk(problem, start)))

    def _walk(self, problem: _Units, start: NDArray[np.int8]) -> NDArray[np.int8]:
        """The best row [units] that the chains came by."""
        rng = np.random.default_rng(self.seed)
        chain = np.arange(self.chains)
        rows = np.tile(start, (self.chains, 1))
        field = problem.field(rows)
        energy = problem.damage(rows)
        best, least = rows.copy(), energy.copy()
        units, width = problem.table.shape
        alone = field[0] - field[0, np.arange(units), start][:, None]
        typical = float(np.median(np.abs(alone[problem.allowed & (alone != 0)]))) if (alone != 0).any() else 1.0
        for temperature in typical * np.geomspace(1.0, 1e-3, max(2000, self.steps * units)):
            i, j = rng.integers(units, size=(2, self.chains))
            a, b = rng.integers(width, size=(2, self.chains))
            j, b = np.where(rng.random(self.chains) < 0.3, (i, a), (j, b))  # a single move
            moved = rows.copy()
            moved[chain, i] = a
            moved[chain, j] = np.where(i == j, a, b)
            good = problem.allowed[i, moved[chain, i]] & problem.allowed[j, moved[chain, j]]
            good[good] = problem.feasible(moved[good])
            change = _change(problem.pairs, field, rows, i, j, moved)
            accept = good & (rng.random(self.chains) < np.exp(np.minimum(-change / temperature, 0)))
            for unit in (i, j):
                k = chain[accept & (rows[chain, unit] != moved[chain, unit])]
                u = unit[k]
                field[k] += problem.pairs[u, moved[k, u]] - problem.pairs[u, rows[k, u]]
                rows[k, u] = moved[k, u]
            energy += np.where(accept, change, 0)
            better = energy < least - 1e-12
            best[better], least[better] = rows[better], energy[better]
        return np.asarray(best[least.argmin()], np.int8)


class _Units:
    """The instance in units: slots, or tied groups of them, that take one candidate."""

    def __init__(self, table: Table, budget: Budget, terms: list[Product], allowed: NDArray[np.bool_]) -> None:
        slots, width = table.shape
        self.first, self.unit = np.unique(budget.leaders(slots), return_inverse=True)
        self.budget = budget
        units = len(self.first)
        self.allowed = np.ones((units, width), np.bool_)
        self.table = np.zeros((units, width))
        self.pairs = np.zeros((units, width, units, width))  # symmetric, 0 within a unit
        for slot, unit in enumerate(self.unit):
            self.allowed[unit] &= allowed[slot]
            self.table[unit] += np.where(allowed[slot], table[slot], 0)
        for term in terms:
            i, j = self.unit[[term.first, term.second]]
            if i == j:
                self.table[i] += np.diag(term.cost)
            else:
                self.pairs[i, :, j] += term.cost
                self.pairs[j, :, i] += term.cost.T
        self.options = [np.flatnonzero(row) for row in self.allowed]

    def slots(self, rows: NDArray[np.int8]) -> Assignments:
        """The assignments [..., slots] of rows [..., units]."""
        return rows[..., self.unit].astype(np.int8)

    def feasible(self, rows: NDArray[np.int8]) -> NDArray[np.bool_]:
        return self.budget.feasible(self.slots(rows))

    def field(self, rows: NDArray[np.int8]) -> NDArray[np.float64]:
        """What each candidate of each unit costs beside the other units of a row, [n, units, candidates]."""
        found = np.tile(self.table, (len(rows), 1, 1))
        for unit, chosen in enumerate(rows.T):
            found += self.pairs[unit, chosen]
        return found

    def damage(self, rows: NDArray[np.int8]) -> NDArray[np.float64]:
        """Of rows [n, units], [n]."""
        both = self.field(rows) + self.table
        own = np.take_along_axis(both, rows[:, :, None].astype(np.intp), axis=2)
        return np.asarray(own.sum(axis=(1, 2)) / 2, np.float64)


def _change(
    pairs: NDArray[np.float64],
    field: NDArray[np.float64],
    rows: NDArray[np.int8],
    i: NDArray[np.int64],
    j: NDArray[np.int64],
    moved: NDArray[np.int8],
) -> NDArray[np.float64]:
    """What it costs each chain to move units i and j (or one, where they are the same), [chains]."""
    chain = np.arange(len(rows))
    (i_now, j_now), (i_new, j_new) = ((r[chain, i], r[chain, j]) for r in (rows, moved))
    one = field[chain, i, i_new] - field[chain, i, i_now]
    other = field[chain, j, j_new] - field[chain, j, j_now]
    joint = (
        pairs[i, i_new, j, j_new] - pairs[i, i_new, j, j_now] - pairs[i, i_now, j, j_new] + pairs[i, i_now, j, j_now]
    )
    return np.where(i == j, one, one + other + joint)


def _descend(problem: _Units, row: NDArray[np.int8]) -> NDArray[np.int8]:
    """Down by the best single or pair move that is allowed, until none helps."""
    units, width = problem.table.shape
    here = np.arange(units)
    while True:
        field = problem.field(row[None])[0]
        alone = np.where(problem.allowed, field - field[here, row][:, None], np.inf)
        now = problem.pairs[:, :, here, row]  # [units, candidates, units]
        joint = (
            problem.pairs - now[:, :, :, None] - problem.pairs[here, row][:, None] + now[here, row][:, None, :, None]
        )
        change = alone[:, :, None, None] + alone + joint
        change[here, :, here] = np.inf
        for unit in here:
            change[unit, np.arange(width), unit, np.arange(width)] = alone[unit]
        order = np.argsort(change, axis=None, kind="stable")
        order = order[change.ravel()[order] < -1e-12 * max(1.0, np.abs(field).max())]
        for start in range(0, len(order), 4096):
            i, a, j, b = np.unravel_index(order[start : start + 4096], change.shape)
            moved = np.tile(row, (len(i), 1))
            moved[np.arange(len(i)), i] = a
            moved[np.arange(len(i)), j] = b
            good = problem.feasible(moved)
            if good.any():
                row = moved[good.argmax()]
                break
        else:
            return row
