import numpy as np
import pytest
from contracts import EvaluatorContract, FakeEvaluator, GameContract, Polynomial
from hypothesis import given, settings
from hypothesis import strategies as st

from smpq_ext import registry
from smpq_ext.core import Budget, Limit, Slot, SmpqError, Space
from smpq_ext.games import BudgetGame, IntervalGame, Remainder, SupernetGame


def space(*candidates, tied=()):
    slots = tuple(Slot(f"layer{i}", "weight", 10, 100, 1) for i in range(len(candidates)))
    return Space(slots, tuple(candidates), tied=tied)


SPACE = space((2, 4, 8), (3,), (2, 8), (2, 3, 4))
DAMAGE = np.array([[3.0, 1.0, 0.2], [5.0, 0, 0], [2.0, 0.1, 0], [7.0, 4.0, 0.5]])


def all_coalitions(players):
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


LOW, HIGH = np.array([0, 0, 0, 1], np.int8), np.array([2, 0, 1, 2], np.int8)
GAMES = {
    "interval": lambda evaluator: IntervalGame(evaluator, LOW, HIGH),
    "supernet": lambda evaluator: SupernetGame(evaluator, np.zeros(DAMAGE.shape)),
    "remainder": lambda evaluator: Remainder(IntervalGame(evaluator, LOW, HIGH), np.arange(3.0)),
}


class TestGames(GameContract):
    @pytest.fixture(params=GAMES)
    def game(self, request):
        return GAMES[request.param](FakeEvaluator(SPACE, DAMAGE))


class TestFakeEvaluator(EvaluatorContract):
    @pytest.fixture
    def evaluator(self):
        return FakeEvaluator(SPACE, DAMAGE)


class TestInterval:
    def test_coalitions_take_high_and_the_others_low(self):
        low, high = np.array([0, 0, 0, 1], np.int8), np.array([2, 0, 0, 2], np.int8)
        game = IntervalGame(FakeEvaluator(SPACE, DAMAGE), low, high)
        np.testing.assert_array_equal(game.slots, [0, 3])
        assert game.players == 2
        rows = game.assignments(np.array([[False, False], [True, False], [True, True]]))
        assert rows.dtype == np.int8
        np.testing.assert_array_equal(rows, [low, [2, 0, 0, 1], high])

    def test_values_are_those_of_the_evaluator_and_every_row_counts(self):
        evaluator = FakeEvaluator(SPACE, DAMAGE)
        game = IntervalGame(evaluator, SPACE.lowest(), SPACE.highest())
        coalitions = all_coalitions(game.players)
        values = game(coalitions)
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, evaluator(game.assignments(coalitions)))
        game(coalitions[:3])
        assert game.spent == len(coalitions) + 3

    def test_an_additive_network_is_attributed_its_damages(self):
        game = IntervalGame(FakeEvaluator(SPACE, DAMAGE), SPACE.lowest(), SPACE.highest())
        (found,) = registry.find("estimators", "exact")().steps(game, 100, np.random.default_rng(0))
        np.testing.assert_allclose(found.values, [2.8, 1.9, 6.5])

    def test_parts_are_games_whose_mean_it_is(self):
        game = IntervalGame(FakeEvaluator(SPACE, DAMAGE, groups=(0.2, 0.3, 0.5)), SPACE.lowest(), SPACE.highest())
        coalitions = all_coalitions(game.players)
        parts = game.parts(8)
        assert [share for share, _ in parts] == [0.2, 0.3, 0.5]
        values = sum(share * part(coalitions) for share, part in parts)
        assert game.spent == len(coalitions)  # every part counts for its share
        np.testing.assert_allclose(values, game(coalitions), rtol=1e-12)
        alone = IntervalGame(FakeEvaluator(SPACE, DAMAGE, groups=(1.0,)), SPACE.lowest(), SPACE.highest())
        assert alone.parts(8) == ((1.0, alone),)

    def test_derivatives_are_the_slopes_of_the_shares(self):
        pairs = np.random.default_rng(0).normal(size=(4, 4))
        evaluator = FakeEvaluator(SPACE, DAMAGE, pairs)
        game = IntervalGame(evaluator, SPACE.lowest(), SPACE.highest())
        low, high = evaluator.space.one_hot(np.stack([game.low, game.high])).astype(np.float64)
        found = game.derivatives(np.array([0.25, 0.5]))
        assert game.spent == 2 and found.shape == (2, game.players)
        for share, slopes in zip((0.25, 0.5), found, strict=True):
            for player, slot in enumerate(game.slots):
                ends = []
                for step in (-1e-4, 1e-4):
                    mixture = low + share * (high - low)
                    mixture[slot] += step * (high - low)[slot]
                    ends.append(evaluator(mixture[None])[0])
                assert (ends[1] - ends[0]) / 2e-4 == pytest.approx(slopes[player], rel=1e-5)

    def test_nothing_between_equal_assignments(self):
        with pytest.raises(SmpqError, match="same assignment"):
            IntervalGame(FakeEvaluator(SPACE, DAMAGE), SPACE.lowest(), SPACE.lowest())

    @pytest.mark.parametrize(
        "wrong", [np.zeros(3, np.int8), np.zeros(4), np.array([0, 1, 0, 0]), np.array([-1, 0, 0, 0])]
    )
    def test_what_is_no_assignment_is_refused(self, wrong):
        with pytest.raises(ValueError, match="high"):
            IntervalGame(FakeEvaluator(SPACE, DAMAGE), SPACE.lowest(), wrong)

    @pytest.mark.parametrize("wrong", [np.zeros((2, 2), bool), np.zeros(3, bool), np.zeros((2, 3), np.int8)])
    def test_what_are_no_coalitions_is_refused(self, wrong):
        game = IntervalGame(FakeEvaluator(SPACE, DAMAGE), SPACE.lowest(), SPACE.highest())
        with pytest.raises(ValueError, match=r"coalitions: expected bool \[n, 3\]"):
            game(wrong)
        assert game.spent == 0


class TestSupernet:
    ALPHA = np.array([[0.0, 1.0, 2.0], [0.0, 9.0, 9.0], [1.0, 1.0, 9.0], [0.5, -0.5, 0.0]])

    def game(self):
        return SupernetGame(FakeEvaluator(SPACE, DAMAGE), self.ALPHA)

    def test_players_are_the_candidates_that_exist(self):
        game = self.game()
        assert game.players == SPACE.mask.sum() == 9
        np.testing.assert_array_equal(game.pairs, np.argwhere(SPACE.mask))

    def test_the_full_set_is_the_softmax(self):
        (full,) = self.game().mixtures(np.ones((1, 9), bool))
        assert full.dtype == np.float32
        np.testing.assert_allclose(full.sum(axis=1), 1, rtol=1e-6)
        assert (full[~SPACE.mask] == 0).all()
        np.testing.assert_allclose(full[0], np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum(), rtol=1e-6)

    @settings(deadline=None)
    @given(st.lists(st.booleans(), min_size=9, max_size=9))
    def test_absent_candidates_weigh_nothing_and_the_others_stay_as_they_were(self, members):
        game = self.game()
        coalition = np.array([members])
        (mixture,) = game.mixtures(coalition)
        inside = np.zeros(SPACE.mask.shape, bool)
        inside[tuple(game.pairs.T)] = members
        for slot in range(4):
            if inside[slot].any():
                np.testing.assert_array_equal(mixture[slot], np.where(inside[slot], game.weights[slot], 0))
            else:  # the strongest stays, the lowest width among equals
                strongest = [2, 0, 0, 0][slot]
                np.testing.assert_array_equal(np.flatnonzero(mixture[slot]), [strongest])
                assert mixture[slot, strongest] == game.weights[slot, strongest]

    def test_every_row_counts(self):
        game = self.game()
        assert game(np.ones((5, 9), bool)).dtype == np.float64
        assert game.spent == 5

    @pytest.mark.parametrize("wrong", [np.zeros((4, 2)), np.full((4, 3), np.nan), np.full((4, 3), np.inf)])
    def test_alpha_is_checked(self, wrong):
        with pytest.raises(ValueError, match="alpha"):
            SupernetGame(FakeEvaluator(SPACE, DAMAGE), wrong)

    def test_large_alphas_do_not_overflow(self):
        game = SupernetGame(FakeEvaluator(SPACE, DAMAGE), 1e4 * self.ALPHA)
        assert np.isfinite(game.weights).all()


def budget_of(space, level, tied=()):
    return Budget((Limit("bits", "bits", level, np.nan_to_num(space.widths, nan=np.inf)),), tied)


class TestBudgetGame:
    SPACE = space(*[(2, 3, 4, 6, 8)] * 9, (2, 8), tied=((0, 3, 4),))
    BUDGET = budget_of(SPACE, 31.0, SPACE.tied)
    REFERENCE = np.ones(10, np.int8) * np.append(np.ones(9, np.int8), np.int8(0))

    def evaluator(self, seed=0, noise=0.0):
        rng = np.random.default_rng(seed)
        damage = -np.sort(-rng.lognormal(0, 1, (10, 5)), axis=1)
        evaluator = FakeEvaluator(self.SPACE, damage)
        by_group = evaluator.by_group
        evaluator.by_group = lambda m: by_group(m) + noise * rng.normal(size=(len(m), 1))
        return evaluator

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32), level=st.floats(29, 60), moves=st.integers(0, 20))
    def test_draws_meet_the_budget_and_stay_in_the_space(self, seed, level, moves):
        budget = budget_of(self.SPACE, level, self.SPACE.tied)
        rows = BudgetGame(self.evaluator(), budget, self.REFERENCE, moves).draw(40, np.random.default_rng(seed))
        assert rows.dtype == np.int8 and rows.shape == (40, 10)
        assert ((rows >= 0) & (rows <= self.SPACE.highest())).all()
        assert budget.feasible(rows).all()
        assert (rows[:, [3, 4]] == rows[:, [0]]).all()

    def test_draws_differ_and_hug_the_budget(self):
        rows = BudgetGame(self.evaluator(), self.BUDGET, self.REFERENCE).draw(200, np.random.default_rng(0))
        assert len(np.unique(rows, axis=0)) > 100
        assert (self.BUDGET.limits[0].cost(rows) > 0.75 * 31).mean() > 0.9

    def test_additive_damages_are_recovered(self):
        evaluator = self.evaluator()
        game = BudgetGame(evaluator, self.BUDGET, self.REFERENCE)
        table, errors = game.main_effects(400, np.random.default_rng(1))
        assert game.spent == 400
        assert table.shape == errors.shape == (10, 5)
        (drawn,) = np.nonzero(np.isfinite(table[5]))  # a slot that is not tied
        np.testing.assert_allclose(
            np.diff(table[5, drawn]), -np.diff(evaluator.damage[5, drawn]), atol=1e-3 + 4 * errors[5, drawn].max()
        )

    def test_what_was_never_drawn_is_not_allowed(self):
        table, errors = BudgetGame(self.evaluator(), self.BUDGET, self.REFERENCE, moves=1).main_effects(
            300, np.random.default_rng(0)
        )
        assert (table[9, 2:] == -np.inf).all() and (errors[9, 2:] == np.inf).all()  # does not exist
        assert (table[5, 3:] == -np.inf).all()  # more than a step away
        assert np.isfinite(table[5, :3]).all()

    def test_standard_errors_tell_the_size_of_the_errors(self):
        ratios = []
        for seed in range(40):
            evaluator = self.evaluator(seed, noise=0.5)
            game = BudgetGame(evaluator, self.BUDGET, self.REFERENCE)
            rng = np.random.default_rng(seed)
            rows = game.draw(150, np.random.default_rng(seed))
            table, errors = game.main_effects(150, rng)
            for slot in (1, 2, 5, 6, 7, 8):
                drawn = np.isfinite(table[slot])
                truth = -evaluator.damage[slot]
                share = np.bincount(rows[:, slot], minlength=5) / len(rows)
                if drawn.sum() > 1:
                    ratios += list((table[slot] - truth + share @ truth)[drawn] / errors[slot, drawn])
        assert 0.7 < np.sqrt(np.mean(np.square(ratios))) < 1.3
        assert np.mean(np.abs(ratios) < 2) > 0.9

    def test_a_constant_value_has_no_effects(self):
        game = BudgetGame(FakeEvaluator(self.SPACE, np.zeros((10, 5))), self.BUDGET, self.REFERENCE)
        table, errors = game.main_effects(50, np.random.default_rng(0))
        assert (table[np.isfinite(table)] == 0).all()
        assert np.nanmax(errors[np.isfinite(errors)]) < 1e-9

    def test_the_same_stream_gives_the_same_bits(self):
        one, two = (
            BudgetGame(self.evaluator(), self.BUDGET, self.REFERENCE).main_effects(60, np.random.default_rng(4))[0]
            for _ in range(2)
        )
        assert one.tobytes() == two.tobytes()

    def test_the_reference_must_meet_the_budget(self):
        with pytest.raises(SmpqError, match="reference"):
            BudgetGame(self.evaluator(), self.BUDGET, self.SPACE.highest())

    def test_too_few_evaluations_are_refused(self):
        game = BudgetGame(self.evaluator(), self.BUDGET, self.REFERENCE)
        with pytest.raises(SmpqError, match="needs 12"):
            game.main_effects(11, np.random.default_rng(0))


class TestRemainder:
    def test_a_surrogate_is_a_control_variate(self):
        game = Polynomial(8, {(0,): 5.0, (1,): -3.0, (2, 3, 4): 1.0})
        weights = np.array([5.0, -3.0, 0.3, 0.3, 0.3, 0, 0, 0])
        (exact,) = registry.find("estimators", "exact")().steps(Remainder(game, weights), 256, np.random.default_rng(0))
        np.testing.assert_allclose(exact.values + weights, game.shapley, atol=1e-9)

    def test_both_games_count(self):
        game = Polynomial(3, {(0,): 1.0})
        remainder = Remainder(game, np.zeros(3))
        remainder(np.zeros((7, 3), bool))
        assert remainder.spent == game.spent == 7

    @pytest.mark.parametrize("wrong", [np.zeros(2), np.array([0, np.nan, 0])])
    def test_weights_are_checked(self, wrong):
        with pytest.raises(ValueError, match="weights"):
            Remainder(Polynomial(3, {}), wrong)
