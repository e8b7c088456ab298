import itertools

import numpy as np
import pytest
from contracts import SolverContract, damage

from smpq_ext import registry
from smpq_ext.core import Budget, Infeasible, Limit, Product, SmpqError
from smpq_ext.solvers.anneal import FEW, Anneal
from smpq_ext.solvers.dp import Dp
from smpq_ext.solvers.milp import Milp


@pytest.fixture(scope="module", params=registry.names("solvers"))
def solver(request):
    return registry.find("solvers", request.param)()


class TestSolvers(SolverContract):
    pass


def limit(name, level, table, *products):
    return Limit(name, "units", level, np.asarray(table, float), products)


def test_dp_prefers_the_cheaper_among_equals():
    budget = Budget((limit("w", 9, [[1, 2, 3], [3, 1, 2]]),))
    np.testing.assert_array_equal(Dp()(np.zeros((2, 3)), budget), [0, 1])


@pytest.mark.parametrize(
    "budget",
    [
        Budget((limit("a", 9, np.ones((2, 2))), limit("b", 9, np.ones((2, 2))))),
        Budget((limit("a", 9, np.ones((2, 2)), Product(0, 1, np.ones((2, 2)))),)),
    ],
)
def test_dp_says_who_takes_what_it_does_not(budget):
    with pytest.raises(SmpqError, match="milp"):
        Dp()(np.zeros((2, 2)), budget)


def test_milp_takes_products():
    # 2 bits x 2 bits = 4, 2 x 4 = 8, 4 x 4 = 16 operations: one of the two may be raised, the one it helps more
    product = Product(0, 1, np.outer([2, 4], [2, 4]))
    table = np.array([[1.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(Milp()(table, Budget((limit("bitops", 8, np.zeros((2, 2)), product),))), [0, 1])
    with pytest.raises(Infeasible, match=r"smallest possible is 4$"):
        Milp()(table, Budget((limit("bitops", 3, np.zeros((2, 2)), product),)))


def test_milp_says_when_limits_only_clash_together():
    table = np.zeros((1, 2))
    with pytest.raises(Infeasible, match=r"not all at once: a=1 \(smallest 0\), b=1 \(smallest 0\)"):
        Milp()(table, Budget((limit("a", 1, [[0, 5]]), limit("b", 1, [[5, 0]]))))


def test_milp_takes_pairs_once_and_checks_them():
    table = np.array([[0.0, 1.0], [0.0, 1.0]])
    pairwise = np.zeros((2, 2, 2, 2))
    pairwise[0, 0, 1, 0] = 1.5  # both low hurts together; the mirrored block is not read
    pairwise[1, 0, 0, 0] = np.nan
    found = Milp()(table, Budget(()), pairwise)
    assert damage(table, found[None], pairwise)[0] == 1
    with pytest.raises(ValueError, match="pairwise"):
        Milp()(table, Budget(()), np.zeros((2, 2)))
    pairwise[0, 0, 1, 0] = np.nan
    with pytest.raises(SmpqError, match="slots 0 and 1"):
        Milp()(table, Budget(()), pairwise)


def test_dp_and_milp_agree_on_damages_of_very_different_sizes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = 10.0 ** rng.uniform(-6, 1, (20, 4))
        cost = rng.lognormal(0, 3, (20, 4))
        budget = Budget((Limit("w", "bits", float(np.median(cost, axis=1).sum()), cost),))
        one, two = (damage(table, s(table, budget)[None])[0] for s in (Dp(), Milp()))
        assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("solver", [Dp(), Milp()])
def test_a_limit_just_missed_by_very_many_assignments_is_kept(solver):
    # thousands of assignments have exactly 3 bits on average, which is more than 2.9999999
    table = np.tile([1.0, 0.5, 0.2], (20, 1)) * np.linspace(1, 2, 20)[:, None]
    budget = Budget((limit("weight-bits", 2.9999999, np.tile([0.1, 0.15, 0.2], (20, 1))),))
    found = solver(table, budget)
    assert budget.limits[0].cost(found)[0] == pytest.approx(2.95)
    assert damage(table, found[None])[0] == pytest.approx(damage(table, Dp()(table, budget)[None])[0])


def instance_of_pairs(slots, width, seed, pairs, tied=()):
    """Damage falls and cost rises with the candidate, as for widths; dense pairs; about half of what all could cost."""
    rng = np.random.default_rng(seed)
    table = np.sort(rng.lognormal(0, 1, (slots, width)), axis=1)[:, ::-1].copy()
    cost = np.cumsum(rng.lognormal(0, 1, (slots, width)), axis=1)
    limit = Limit("w", "units", 0.8 * float(cost.mean(axis=1).sum()), cost)
    return table, Budget((limit,), tied), pairs * rng.normal(size=(slots, width, slots, width))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [(), ((0, 3), (2, 5, 7))])
def test_annealing_equals_brute_force_where_it_does_not_enumerate(seed, tied):
    table, budget, pairwise = instance_of_pairs(8 + 3 * bool(tied), 4, seed, 0.3, tied)
    units = np.array(list(itertools.product(range(4), repeat=8)), np.int8)
    assert len(units) > FEW
    parent = np.arange(len(table))
    for group in tied:
        parent[list(group)] = group[0]
    rows = units[:, np.unique(parent, return_inverse=True)[1]]
    rows = rows[budget.feasible(rows)]
    found = Anneal()(table, budget, pairwise)
    assert budget.feasible(found)[0]
    assert damage(table, found[None], pairwise)[0] == pytest.approx(damage(table, rows, pairwise).min(), rel=1e-9)


def test_annealing_finds_what_the_linear_programme_proves():
    table, budget, pairwise = instance_of_pairs(30, 3, 0, 1.0)
    few = np.zeros_like(pairwise)
    for i, j in np.random.default_rng(1).permutation(list(itertools.combinations(range(30), 2)))[:20]:
        few[i, :, j] = pairwise[i, :, j]
    proved, found = Milp()(table, budget, few), Anneal()(table, budget, few)
    assert damage(table, found[None], few)[0] == pytest.approx(damage(table, proved[None], few)[0], rel=1e-9)
