"""What every part must hold: subclass the contract of its interface and give the fixtures that it asks for."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smpq_ext.core import Budget, Infeasible, Limit, Product, SmpqError, Space, TooFew


class Polynomial:
    """A game that is a sum of products of players, whose Shapley values are known: each term is shared equally.

    The offset keeps every value above half of the full one, so that no truncation bites.
    """

    def __init__(self, players, terms, offset=1000.0):
        self.players = players
        self.terms = {tuple(t): float(c) for t, c in terms.items()}
        self.offset = offset
        self.spent = 0

    def __call__(self, coalitions):
        assert coalitions.dtype == np.bool_
        assert coalitions.ndim == 2 and coalitions.shape[1] == self.players
        self.spent += len(coalitions)
        values = np.full(len(coalitions), self.offset)
        for members, weight in self.terms.items():
            values += weight * coalitions[:, list(members)].all(axis=1)
        return values

    @property
    def shapley(self):
        values = np.zeros(self.players)
        for members, weight in self.terms.items():
            values[list(members)] += weight / len(members)
        return values


class Spoiled(Polynomial):
    """One whose values go through `spoil(values, coalitions)`."""

    def __init__(self, terms, spoil):
        super().__init__(len(terms), terms)
        self.spoil = spoil

    def __call__(self, coalitions):
        return self.spoil(super().__call__(coalitions), coalitions)


def additive(players, seed=0):
    return Polynomial(players, {(i,): c for i, c in enumerate(np.random.default_rng(seed).normal(size=players))})


def third_order(players, seed=0):
    """Random terms of orders one to three on all players but the last, which is null; players 0 and 1 are symmetric."""
    rng = np.random.default_rng(seed)
    terms = {}
    for order in (1, 2, 3):
        for members in itertools.combinations(range(players - 1), order):
            swapped = tuple(sorted({0: 1, 1: 0}.get(m, m) for m in members))
            terms[members] = terms[swapped] if swapped in terms else rng.normal()
    return Polynomial(players, terms)


def smallest_budget(estimator, game):
    with pytest.raises(TooFew, match=r"^evaluations: 1 are too few") as caught:
        next(estimator.steps(game, 1, np.random.default_rng(0)))
    return int(re.findall(r"\d+", str(caught.value))[-1])


class EstimatorContract:
    """Needs a fixture `estimator` that outlives a test (scope "module")."""

    @pytest.mark.parametrize("players", [1, 2, 3, 6, 11])
    def test_additive_games_are_found_within_the_errors(self, estimator, players):
        game = additive(players)
        for found in estimator.steps(game, max(2**players, 4 * players + 2), np.random.default_rng(1)):
            assert (np.abs(found.values - game.shapley) <= 5 * found.standard_errors + 1e-9).all()
            assert found.values.dtype == found.standard_errors.dtype == np.float64

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_values_sum_to_what_the_full_set_is_worth(self, estimator, seed):
        game = third_order(7, seed)
        for found in estimator.steps(game, 400, np.random.default_rng(seed)):
            assert found.values.sum() == pytest.approx(sum(game.terms.values()), abs=1e-8)

    def test_a_third_order_game_is_found_within_its_errors(self, estimator):
        game = third_order(9)
        *_, found = estimator.steps(game, 4000, np.random.default_rng(3))
        assert np.abs(found.values - game.shapley).max() < 0.1 * np.abs(game.shapley).max()
        assert (np.abs(found.values - game.shapley) <= 5 * found.standard_errors + 1e-8).all()
        # 8 is null, 0 and 1 are symmetric
        assert abs(found.values[8]) <= 5 * found.standard_errors[8] + 1e-8
        assert abs(found.values[0] - found.values[1]) <= 5 * found.standard_errors[:2].sum() + 1e-8

    def test_standard_errors_tell_the_size_of_the_errors(self, estimator):
        game = third_order(10)
        # half of all coalitions, so that no estimator that can do with fewer has seen everything
        budget = max(500, smallest_budget(estimator, game))
        ratios = []
        for seed in range(60):
            *_, found = estimator.steps(game, budget, np.random.default_rng(seed))
            known = found.standard_errors > 1e-9
            np.testing.assert_allclose(found.values[~known], game.shapley[~known], atol=1e-6)
            ratios += list((found.values - game.shapley)[known] / found.standard_errors[known])
        if ratios:
            assert np.sqrt(np.mean(np.square(ratios))) < 1.4
            assert np.mean(np.abs(ratios) < 2) > 0.87
            if found.standard_errors.mean() > 0.01 * np.abs(game.shapley).max():  # below, caution costs nothing
                assert np.sqrt(np.mean(np.square(ratios))) > 0.6

    @settings(max_examples=25, deadline=None)
    @given(players=st.integers(1, 9), extra=st.integers(0, 500), seed=st.integers(0, 2**32))
    def test_the_budget_is_kept_and_counted(self, estimator, players, extra, seed):
        least = smallest_budget(estimator, third_order(players) if players > 1 else additive(1))
        game = third_order(players) if players > 1 else additive(1)
        before = 0
        for found in estimator.steps(game, least + extra, np.random.default_rng(seed)):
            assert before < found.evaluations == game.spent <= least + extra
            assert np.isfinite(found.values).all()
            assert (found.standard_errors >= 0).all()
            before = found.evaluations
        assert before > 0

    @pytest.mark.parametrize("players", [2, 5, 8])
    def test_a_budget_too_small_is_refused_and_the_smallest_named(self, estimator, players):
        game = additive(players)
        least = smallest_budget(estimator, game)
        with pytest.raises(TooFew, match=rf"\b{least - 1} are too few.*\b{least}$"):
            next(estimator.steps(game, least - 1, np.random.default_rng(0)))
        assert next(estimator.steps(game, least, np.random.default_rng(0))).values.shape == (players,)

    @pytest.mark.parametrize("budget", [100.0, np.inf, "100", None])
    def test_a_budget_that_is_no_whole_number_is_refused(self, estimator, budget):
        with pytest.raises(SmpqError, match=r"^evaluations: a whole number, not "):
            next(estimator.steps(additive(4), budget, np.random.default_rng(0)))

    def test_a_game_without_players_is_refused(self, estimator):
        game = additive(1)
        game.players = 0
        with pytest.raises(SmpqError, match=r"^game: it has 0 players"):
            next(estimator.steps(game, 100, np.random.default_rng(0)))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_value_that_is_not_finite_is_named(self, estimator, value):
        game = Spoiled(additive(5).terms, lambda values, rows: np.where(rows[:, 0] & ~rows[:, 1], value, values))
        with pytest.raises(SmpqError, match=rf"^game: the value of the coalition of players \[0\b.*\] is {value}$"):
            list(estimator.steps(game, 200, np.random.default_rng(0)))

    def test_values_of_another_shape_are_refused(self, estimator):
        game = Spoiled(additive(5).terms, lambda values, rows: values[:, None])
        with pytest.raises(SmpqError, match=r"^game: \d+ coalitions get values \[\d+, 1\], not \[\d+\]$"):
            next(estimator.steps(game, 200, np.random.default_rng(0)))

    def test_the_same_stream_gives_the_same_bits(self, estimator):
        runs = [list(estimator.steps(third_order(8), 1000, np.random.default_rng(5))) for _ in range(2)]
        for one, two in zip(*runs, strict=True):
            assert one.values.tobytes() == two.values.tobytes()
            assert one.standard_errors.tobytes() == two.standard_errors.tobytes()

    def test_standard_errors_shrink(self, estimator):
        steps = list(estimator.steps(third_order(12), 6000, np.random.default_rng(0)))
        assert len(steps) == 1 or steps[-1].standard_errors.mean() < 0.5 * steps[0].standard_errors.mean()


def brute_force(table, budget, pairwise=None):
    """Damage of the best assignment, inf if there is none; and all feasible assignments with their damages."""
    slots, width = table.shape
    rows = np.array(list(itertools.product(range(width), repeat=slots)), np.int8)
    rows = rows[np.isfinite(table[np.arange(slots), rows]).all(axis=1)]
    rows = rows[budget.feasible(rows)] if len(rows) else rows
    damages = damage(table, rows, pairwise)
    return min(damages, default=math.inf)


def damage(table, rows, pairwise=None):
    slots = len(table)
    total = table[np.arange(slots), rows].sum(axis=1)
    if pairwise is not None:
        for i, j in itertools.combinations(range(slots), 2):
            total = total + pairwise[i, rows[:, i], j, rows[:, j]]
    return total


@st.composite
def instances(draw, limits=(0, 1), products=False, ties=True):
    """A score table [slots, candidates] and a budget; small integers make ties, floats make odd costs."""
    slots, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    even = draw(st.booleans())

    def numbers(*shape):
        return rng.integers(0, 4, shape).astype(np.float64) if even else rng.lognormal(0, 2, shape)

    table = numbers(slots, width) - draw(st.sampled_from([0.0, 1.0]))
    table[:, 1:][rng.random((slots, width - 1)) < draw(st.sampled_from([0.0, 0.3]))] = np.inf
    found = []
    for index in range(draw(st.integers(*limits))):
        pairs = []
        if products:
            for first, second in itertools.combinations(range(slots), 2):
                if rng.random() < 0.4:
                    pairs.append(Product(first, second, numbers(width, width)))
        limit = Limit(f"limit{index}", "units", 1.0, numbers(slots, width), tuple(pairs), float(numbers(1)[0]))
        # the cost of a random assignment, so that limits bite and are met exactly
        level = float(limit.cost(rng.integers(0, width, slots).astype(np.int8))[0])
        found.append(Limit(limit.name, limit.unit, level, limit.table, limit.products, limit.constant))
    tied = (tuple(range(0, slots, 2)),) if ties and slots > 2 and draw(st.booleans()) else ()
    return table, Budget(tuple(found), tied)


class SolverContract:
    """Needs a fixture `solver` that outlives a test (scope "module").

    A solver may refuse several limits, products or pairs with an SmpqError that names one that takes them.
    """

    @staticmethod
    def check(solver, table, budget, pairwise=None):
        best = brute_force(table, budget, pairwise)
        try:
            found = solver(table, budget) if pairwise is None else solver(table, budget, pairwise)
        except Infeasible as error:
            assert best == math.inf
            assert str(error).startswith("budget: ") and "\n" not in str(error)
            return
        except SmpqError as error:
            assert len(budget.limits) > 1 or pairwise is not None or any(li.products for li in budget.limits)
            assert "take solver" in str(error)
            return
        assert found.dtype == np.int8 and found.shape == (len(table),)
        assert budget.feasible(found)[0]
        scale = np.abs(table[np.isfinite(table)]).max()
        assert damage(table, found[None], pairwise)[0] == pytest.approx(best, rel=1e-9, abs=1e-9 * scale)
        again = solver(table, budget) if pairwise is None else solver(table, budget, pairwise)
        assert again.tobytes() == found.tobytes()

    @settings(max_examples=150, deadline=None)
    @given(instance=instances())
    def test_equals_brute_force(self, solver, instance):
        self.check(solver, *instance)

    @settings(max_examples=60, deadline=None)
    @given(instance=instances(limits=(1, 3), products=True))
    def test_equals_brute_force_with_several_limits_and_products(self, solver, instance):
        self.check(solver, *instance)

    @settings(max_examples=40, deadline=None)
    @given(instance=instances(limits=(0, 1)), seed=st.integers(0, 2**32))
    def test_equals_brute_force_with_pairs(self, solver, instance, seed):
        table, budget = instance
        slots, width = table.shape
        self.check(solver, table, budget, np.random.default_rng(seed).normal(size=(slots, width, slots, width)))

    def test_no_limit_takes_the_least_damage(self, solver):
        table = np.array([[3.0, 1.0, np.inf], [0.5, 2.0, 0.25]])
        np.testing.assert_array_equal(solver(table, Budget(())), [1, 2])

    def test_an_infeasible_limit_names_itself_and_what_is_possible(self, solver):
        cost = np.array([[2.0, 4.0], [1.234567891, 4.0]])
        with pytest.raises(Infeasible, match=r"weight-bits=1.5 \(bits\).*smallest possible is 3\.23457$"):
            solver(np.zeros((2, 2)), Budget((Limit("weight-bits", "bits", 1.5, cost),)))
        np.testing.assert_array_equal(solver(np.zeros((2, 2)), Budget((Limit("w", "bits", 3.23457, cost),))), [0, 0])

    @pytest.mark.parametrize("pairwise", [None, np.ones((2, 2, 2, 2))])
    def test_tied_slots_without_a_candidate_in_common_are_infeasible(self, solver, pairwise):
        table, budget = np.array([[np.inf, 0.0], [0.0, np.inf]]), Budget((), ((0, 1),))
        with pytest.raises(SmpqError, match=r"have no candidate in common|take solver"):
            solver(table, budget, pairwise)

    def test_what_is_not_allowed_counts_in_the_smallest_possible(self, solver):
        table = np.array([[np.inf, 0.0], [0.0, 0.0]])
        limit = Limit("bytes", "bytes", 5.0, np.array([[2.0, 4.0], [2.0, 4.0]]), constant=1.0)
        with pytest.raises(Infeasible, match=r"smallest possible is 7$"):
            solver(table, Budget((limit,)))

    def test_padding_of_the_cost_table_is_not_read(self, solver):
        table = np.array([[1.0, np.inf], [1.0, 0.0]])
        cost = np.array([[1.0, np.inf], [1.0, 2.0]])
        np.testing.assert_array_equal(solver(table, Budget((Limit("w", "bits", 3.0, cost),))), [0, 1])

    def test_tied_slots_without_a_common_candidate_are_infeasible(self, solver):
        table = np.array([[np.inf, 0.0], [0.0, np.inf]])
        with pytest.raises(Infeasible, match="tied"):
            solver(table, Budget((Limit("w", "bits", 9.0, np.ones((2, 2))),), tied=((0, 1),)))

    @pytest.mark.parametrize("wrong", [np.nan, -np.inf])
    def test_a_damage_that_is_no_number_names_its_slot(self, solver, wrong):
        table = np.zeros((3, 2))
        table[1, 0] = wrong
        with pytest.raises(SmpqError, match="slot 1"):
            solver(table, Budget(()))

    def test_a_slot_with_nothing_allowed_is_named(self, solver):
        table = np.zeros((3, 2))
        table[2] = np.inf
        with pytest.raises(SmpqError, match="slot 2"):
            solver(table, Budget(()))

    def test_a_real_size_is_solved(self, solver):
        rng = np.random.default_rng(0)
        bits, elements = np.array([2, 3, 4, 6, 8.0]), rng.lognormal(10, 1, 54)
        table = rng.lognormal(0, 2, (54, 1)) * 4.0**-bits * rng.uniform(0.7, 1.3, (54, 5))
        budget = Budget((Limit("weight-bits", "bits", 3.0, elements[:, None] * bits / elements.sum()),))
        found = solver(table, budget)
        assert budget.feasible(found)[0]
        # no single move that stays within the budget is better
        moved = np.tile(found, (54 * 5, 1))
        moved[np.arange(54 * 5), np.repeat(np.arange(54), 5)] = np.tile(np.arange(5), 54)
        moved = moved[budget.feasible(moved)]
        assert damage(table, found[None])[0] <= damage(table, moved).min() + 1e-12


class StoreContract:
    """Needs a fixture `store` that is empty."""

    def test_an_unknown_study_is_empty(self, store):
        assert store.read("nothing") == {}

    def test_what_was_appended_is_read_to_the_bit(self, store):
        rows = {b"a\x00\xff": np.array([0.1, -np.pi, 1e-310]), b"": np.array([1.0, 2.0, 3.0])}
        store.append("one", rows)
        found = store.read("one")
        assert found.keys() == rows.keys()
        for key, groups in rows.items():
            assert found[key].dtype == np.float64
            assert found[key].tobytes() == groups.tobytes()

    def test_studies_do_not_mix(self, store):
        store.append("one", {b"k": np.array([1.0])})
        store.append("two", {b"k": np.array([2.0])})
        assert store.read("one")[b"k"][0] == 1
        assert store.read("two")[b"k"][0] == 2

    def test_the_first_value_stays(self, store):
        store.append("one", {b"k": np.array([1.0])})
        store.append("one", {b"k": np.array([2.0]), b"l": np.array([3.0])})
        assert {key: groups[0] for key, groups in store.read("one").items()} == {b"k": 1.0, b"l": 3.0}

    def test_what_was_read_or_appended_is_a_copy(self, store):
        groups = np.array([1.0])
        store.append("one", {b"k": groups})
        groups[0] = 5
        store.read("one")[b"k"][0] = 7
        assert store.read("one")[b"k"][0] == 1

    def test_nothing_can_be_appended(self, store):
        store.append("one", {})
        assert store.read("one") == {}


class FakeEvaluator:
    """An evaluator without a network: minus the summed damage of the mixtures, per group, plus pairs of slots."""

    def __init__(self, space: Space, damage, pairs=None, groups=(0.25, 0.75), rows_per_batch=8, factors=None):
        self.space = space
        self.factors = 1 + np.arange(len(groups)) - (np.arange(len(groups)) @ groups) if factors is None else factors
        self.fingerprint = "fake" if factors is None else f"fake {factors}"
        self.slots = tuple(s.name for s in space.slots)
        self.groups = np.array(groups)
        self.rows_per_batch = rows_per_batch
        self.damage = np.asarray(damage, np.float64)
        self.pairs = pairs
        self.requests = []

    def by_group(self, mixtures):
        self.requests.append(np.array(mixtures))
        rows = np.asarray(mixtures)
        if rows.ndim == 2:
            rows = self.space.one_hot(rows)
        picked = (rows * np.where(self.space.mask, self.damage, 0)).sum(axis=2)
        total = picked.sum(axis=1)
        if self.pairs is not None:
            total = total + np.einsum("ni,ij,nj->n", picked, self.pairs, picked)
        return -total[:, None] * self.factors

    def derivatives(self, mixtures):
        damage = np.where(self.space.mask, self.damage, 0)
        slope = np.ones(mixtures.shape[:2])
        if self.pairs is not None:
            slope = slope + (mixtures * damage).sum(axis=2) @ (self.pairs + self.pairs.T)
        return -slope[:, :, None] * damage * (self.factors @ self.groups)

    def parts(self, most):
        if len(self.groups) == 1 or most < len(self.groups):
            return ((1.0, self),)
        return tuple(
            (share, FakeEvaluator(self.space, self.damage, self.pairs, (1.0,), 8, [f]))
            for share, f in zip(self.groups.tolist(), self.factors, strict=True)
        )

    def __call__(self, mixtures):
        return self.by_group(mixtures) @ self.groups


class EvaluatorContract:
    """Give a fixture `evaluator`."""

    @staticmethod
    def rows(evaluator, n=5):
        highest = evaluator.space.highest()
        return np.random.default_rng(0).integers(0, highest + 1, (n, len(highest))).astype(np.int8)

    def test_it_says_what_it_evaluates(self, evaluator):
        assert isinstance(evaluator.fingerprint, str) and evaluator.fingerprint
        assert evaluator.slots == tuple(s.name for s in evaluator.space.slots)
        assert evaluator.rows_per_batch >= 1
        assert evaluator.groups.sum() == pytest.approx(1) and (evaluator.groups >= 0).all()

    def test_a_value_is_the_mean_over_the_groups(self, evaluator):
        rows = self.rows(evaluator)
        values, groups = evaluator(rows), evaluator.by_group(rows)
        assert values.dtype == np.float64 and values.shape == (len(rows),)
        assert groups.shape == (len(rows), len(evaluator.groups))
        np.testing.assert_allclose(groups @ evaluator.groups, values, rtol=1e-12)

    def test_an_assignment_is_its_one_hot_mixture(self, evaluator):
        rows = self.rows(evaluator)
        np.testing.assert_array_equal(evaluator(evaluator.space.one_hot(rows)), evaluator(rows))

    def test_order_and_repetition_change_nothing(self, evaluator):
        rows = self.rows(evaluator)
        np.testing.assert_array_equal(evaluator(rows[[3, 0, 3]]), evaluator(rows[[0, 3]])[[1, 0, 1]])

    def test_no_rows_have_no_values(self, evaluator):
        assert evaluator(self.rows(evaluator, 0)).shape == (0,)

    def test_parts_are_the_groups(self, evaluator):
        parts = evaluator.parts(100)
        if len(parts) == 1:
            assert parts == ((1.0, evaluator),)
            return
        rows = self.rows(evaluator)
        of_groups = evaluator.by_group(rows)
        assert [share for share, _ in parts] == pytest.approx(evaluator.groups)
        for (_, part), expected in zip(parts, of_groups.T, strict=True):
            np.testing.assert_allclose(part(rows), expected, rtol=1e-5)
        assert len({evaluator.fingerprint, *(part.fingerprint for _, part in parts)}) == len(parts) + 1

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_few_parts_have_the_value_as_their_mean(self, evaluator, most):
        parts, rows = evaluator.parts(most), self.rows(evaluator)
        assert len(parts) <= most
        found = sum(share * part(rows) for share, part in parts)
        np.testing.assert_allclose(found, evaluator(rows), rtol=1e-5)

    def test_derivatives_are_finite_numbers_for_what_exists(self, evaluator):
        space = evaluator.space
        mixtures = (space.mask / space.mask.sum(axis=1, keepdims=True)).astype(np.float32)[None].repeat(2, axis=0)
        found = evaluator.derivatives(mixtures)
        assert found.shape == mixtures.shape and found.dtype == np.float64
        assert np.isfinite(found).all() and (found[:, ~space.mask] == 0).all()
        np.testing.assert_array_equal(found[0], found[1])


class GameContract:
    """Give a fixture `game`."""

    @staticmethod
    def coalitions(game, n=6):
        return np.random.default_rng(0).random((n, game.players)) < 0.5

    def test_what_was_asked_is_counted_also_when_it_was_known(self, game):
        coalitions = self.coalitions(game)
        before = game.spent
        game(coalitions)
        game(coalitions[[0, 0]])
        assert game.spent == before + len(coalitions) + 2

    def test_a_coalition_has_one_value_whoever_is_asked_with_it(self, game):
        coalitions = self.coalitions(game)
        values = game(coalitions)
        assert values.dtype == np.float64 and values.shape == (len(coalitions),)
        np.testing.assert_array_equal(game(coalitions[::-1]), values[::-1])

    def test_no_coalitions_have_no_values(self, game):
        assert game(self.coalitions(game, 0)).shape == (0,)

    def test_coalitions_of_other_players_are_refused(self, game):
        with pytest.raises(ValueError, match="coalitions"):
            game(np.ones((1, game.players + 1), np.bool_))


class MethodContract:
    """Give fixtures `kind`, that makes the method, and `problems`: (method, budget=, evaluations=) to a Problem."""

    def test_a_plan_within_the_budget_and_the_same_one_again(self, kind, problems):
        answers = []
        for _ in range(2):
            method = kind()
            given = problems(method)
            answers.append(method.allocate(given))
            asked = given.evaluator.asked + (given.holdout.asked if given.holdout else 0)
            assert asked + answers[-1].evaluations <= given.evaluations
        one, two = answers
        assert one.assignment.dtype == np.int8 and one.assignment.shape == (len(given.space.slots),)
        assert given.budget.feasible(one.assignment).all()
        np.testing.assert_array_equal(one.assignment, two.assignment)
        for ours, theirs in ((one.scores, two.scores), (one.score_errors, two.score_errors)):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.shape == given.space.mask.shape
                np.testing.assert_array_equal(ours, theirs)
        if one.scores is not None:
            assert np.isfinite(one.scores[given.space.mask]).all()

    def test_the_model_is_only_read(self, kind, problems):
        method = kind()
        given = problems(method)
        before = {name: tensor.clone() for name, tensor in given.model.model.state_dict().items()}
        modes = [module.training for module in given.model.model.modules()]
        method.allocate(given)
        after = given.model.model.state_dict()
        assert list(after) == list(before)
        assert all(tensor.equal(before[name]) for name, tensor in after.items())
        assert modes == [module.training for module in given.model.model.modules()]

    def test_an_infeasible_budget_is_refused(self, kind, problems):
        method = kind()
        with pytest.raises(Infeasible, match=r"^budget: "):
            method.allocate(problems(method, budget="weight-bits=1.5"))

    def test_few_evaluations_are_enough_or_refused_before_any_is_spent(self, kind, problems):
        method = kind()
        given = problems(method, evaluations=3)
        try:
            method.allocate(given)
        except SmpqError as error:
            assert str(error).startswith("evaluations: 3 ")
        asked = given.evaluator.asked + (given.holdout.asked if given.holdout else 0)
        assert asked <= 3
