"""The integer linear programme, solved to optimality by HiGHS; it takes every kind of budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped,unused-ignore]
from scipy.sparse import csr_array  # type: ignore[import-untyped,unused-ignore]

from smpq_ext.core import Assignments, Budget, Infeasible, Limit, Product, SmpqError, Table

__all__ = ["Milp"]


@dataclass(frozen=True)
class Milp:
    """Least damage under any number of limits, products and ties, to a relative gap of 0.

    `pairwise` is [slots, candidates, slots, candidates]; of each pair of slots the block [i, :, j, :] with i < j is
    added to the damage, blocks of zeros cost nothing. Products and pairs are linearised without loss, one variable per
    pair of candidates, so dozens of dense pairs take long: the solver 'anneal' takes any number. Equal instances give
    equal answers.

    Raises Infeasible; SmpqError where the table has a NaN or HiGHS gives up. Source: reformulation-linearization
    (Adams and Sherali, Management Science 1986).
    """

    def __call__(self, table: Table, budget: Budget, pairwise: NDArray[np.float64] | None = None) -> Assignments:
        """The assignment [slots] of least damage."""
        allowed = check(table)
        terms = [] if pairwise is None else pair_terms(pairwise, allowed)
        best = minimise(table, terms, budget.limits, budget.tied, allowed)
        if best is None:
            raise infeasible(budget, allowed)
        return best


def check(table: Table) -> NDArray[np.bool_]:
    """Which entries [slots, candidates] may be chosen. Raises SmpqError naming the slot that is wrong."""
    for slot, row in enumerate(table):
        if np.isnan(row).any() or (row == -np.inf).any():
            raise SmpqError(f"table: slot {slot} has a damage that is not a number, {row.tolist()}")
        if np.isinf(row).all():
            raise SmpqError(f"table: slot {slot} has no candidate that is allowed")
    return np.isfinite(table)


def infeasible(budget: Budget, allowed: NDArray[np.bool_]) -> Infeasible:
    """The error for a budget that no allowed assignment meets: which limit, and how low its cost can get."""
    reachable = []
    for limit in budget.limits:
        best = minimise(limit.table, limit.products, (), budget.tied, allowed)
        if best is None:
            break
        smallest = _round_up(float(limit.cost(best)[0]))
        if not Budget((limit,)).feasible(best)[0]:
            given = f"{limit.name}={limit.limit:.9g} ({limit.unit})"
            return Infeasible(f"budget: {given} cannot be met, the smallest possible is {smallest}")
        reachable.append(f"{limit.name}={limit.limit:.9g} (smallest {smallest})")
    if len(reachable) < len(budget.limits) or not reachable:
        return Infeasible(f"budget: the tied slots {list(budget.tied)} have no candidate in common")
    return Infeasible(f"budget: each limit can be met, but not all at once: {', '.join(reachable)}")


def minimise(
    objective: Table,
    terms: Sequence[Product],
    limits: Sequence[Limit],
    tied: Sequence[tuple[int, ...]],
    allowed: NDArray[np.bool_],
) -> Assignments | None:
    """The allowed assignment [slots] that minimises `objective` plus `terms` within the limits; None if there is none.

    Variables are one binary x per (slot, candidate), and y[a, b] = x[first, a] x[second, b] for each pair of slots with
    a term: the sums of y over b are x[first], those over a are x[second], which leaves no other y once x is binary.
    """
    slots, width = objective.shape
    x = np.arange(slots * width).reshape(slots, width)
    products = [*terms, *(p for limit in limits for p in limit.products)]
    y: dict[tuple[int, int], NDArray[np.int64]] = {}
    for product in products:
        start = x.size + len(y) * width**2
        y.setdefault((product.first, product.second), np.arange(start, start + width**2).reshape(width, width))
    count = x.size + len(y) * width**2

    def linear(table: Table, pairs: Sequence[Product]) -> NDArray[np.float64]:
        coefficients = np.zeros(count)
        coefficients[x] = np.where(allowed, table, 0)
        for p in pairs:
            both = allowed[p.first][:, None] & allowed[p.second]
            coefficients[y[p.first, p.second]] += np.where(both, p.cost, 0)
        return coefficients

    rows: list[tuple[NDArray[np.int64], NDArray[np.float64], float, float]] = []  # variables, coefficients, low, high
    one = np.ones(width)
    rows += [(x[i], one, 1, 1) for i in range(slots)]
    for first, *others in tied:
        rows += [(np.array([x[i, c], x[first, c]]), np.array([1.0, -1.0]), 0, 0) for i in others for c in range(width)]
    for (first, second), block in y.items():
        for c in range(width):
            rows.append((np.append(block[c], x[first, c]), np.append(one, -1), 0, 0))
            rows.append((np.append(block[:, c], x[second, c]), np.append(one, -1), 0, 0))

    upper = np.ones(count)
    upper[x] = allowed
    for (first, second), block in y.items():
        upper[block] = allowed[first][:, None] & allowed[second]
    bounds: list[tuple[NDArray[np.int64], NDArray[np.float64], float, float]] = []
    for limit in limits:
        # of each slot and each block exactly one variable is 1, so only what it costs above the cheapest matters, and
        # what costs more than there is room for cannot be chosen: coefficients of one size keep HiGHS exact
        coefficients = linear(limit.table, limit.products)
        room = limit.limit * (1 + 1e-9) + 1e-9 - limit.constant
        for members in (*x, *(block.ravel() for block in y.values())):
            least = coefficients[members].min(where=upper[members] > 0, initial=np.inf)
            coefficients[members] -= least
            room -= least
        if room < 0:
            return None
        upper[coefficients > room] = 0
        used = np.flatnonzero((coefficients > 0) & (upper > 0))
        scale = 1 / (abs(limit.limit) or room)
        bounds.append((used, coefficients[used] * scale, -np.inf, room * scale))

    damage = linear(objective, terms)
    damage *= 1e4 / (np.abs(damage).max() or 1.0)  # HiGHS stops at an absolute gap of 1e-6
    integral = np.zeros(count)
    integral[x] = 1
    scale = 1.0
    while True:
        system = rows + [(used, scale * coefficients, low, scale * high) for used, coefficients, low, high in bounds]
        lengths = np.cumsum([0] + [len(variables) for variables, *_ in system])
        matrix = csr_array(
            (np.concatenate([r[1] for r in system]), np.concatenate([r[0] for r in system]), lengths),
            shape=(len(system), count),
        )
        answer = milp(
            damage,
            constraints=LinearConstraint(matrix, np.array([r[2] for r in system]), np.array([r[3] for r in system])),
            bounds=Bounds(np.zeros(count), upper),
            integrality=integral,
            options={"mip_rel_gap": 0.0},
        )
        if answer.status == 2:
            return None
        if answer.status != 0:
            raise SmpqError(f"milp: HiGHS found no optimum ({answer.message}); take solver 'dp' or fewer pairs")
        best: Assignments = answer.x[x].argmax(axis=1).astype(np.int8)
        if Budget(tuple(limits), tuple(tied)).feasible(best)[0]:
            return best
        # HiGHS lets a row be missed by 1e-6. Forbid this assignment and look again, closer: at the scale of 1e3 that is
        # the tolerance of Budget.feasible (not from the start, it makes HiGHS work harder)
        scale = min(10 * scale, 1e3)
        rows.append((x[np.arange(slots), best], np.ones(slots), -np.inf, slots - 1))


def pair_terms(pairwise: NDArray[np.float64], allowed: NDArray[np.bool_]) -> list[Product]:
    """The blocks [i, :, j, :], i < j, that are not zero. Raises SmpqError where one is not finite."""
    slots, width = allowed.shape
    if pairwise.shape != (slots, width, slots, width):
        raise ValueError(f"pairwise: expected shape {(slots, width, slots, width)}, got {pairwise.shape}")
    terms = []
    for i in range(slots):
        for j in range(i + 1, slots):
            block = np.where(allowed[i][:, None] & allowed[j], pairwise[i, :, j, :], 0)
            if not np.isfinite(block).all():
                raise SmpqError(f"pairwise: slots {i} and {j} have a damage that is not a finite number")
            if block.any():
                terms.append(Product(i, j, block))
    return terms


def _round_up(cost: float) -> str:
    """The cost in six digits, rounded up so that it can be given as a limit."""
    if cost == 0:
        return "0"
    unit = 10.0 ** (np.floor(np.log10(abs(cost))) - 5)
    return np.format_float_positional(float(f"{np.ceil(cost / unit * (1 - 1e-12)) * unit:.6g}"), trim="-")
