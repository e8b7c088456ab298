import itertools
import zlib

import numpy as np
import pytest
from contracts import EstimatorContract, Polynomial, additive, third_order

from smpq_ext import registry
from smpq_ext.core import SmpqError


@pytest.fixture(scope="module", params=registry.names("estimators"))
def estimator(request):
    return registry.find("estimators", request.param)()


class TestEstimators(EstimatorContract):
    pass


def last(name, game, budget, seed=0, **settings):
    *_, found = registry.find("estimators", name)(**settings).steps(game, budget, np.random.default_rng(seed))
    return found


@pytest.mark.parametrize("name", sorted(set(registry.names("estimators")) - {"stratified"}))
@pytest.mark.parametrize("players", [1, 2, 3, 6, 11])
def test_additive_games_are_exact(name, players):
    game = additive(players)
    found = last(name, game, max(2**players, 4 * players + 2))
    np.testing.assert_allclose(found.values, game.shapley, atol=1e-9)
    np.testing.assert_allclose(found.standard_errors, 0, atol=1e-4)


class Arbitrary:
    """A game without any structure."""

    def __init__(self, players, seed=0):
        self.players = players
        self.spent = 0
        self.table = np.random.default_rng(seed).normal(size=2**players)

    def __call__(self, coalitions):
        self.spent += len(coalitions)
        return self.table[coalitions @ (1 << np.arange(self.players))]


@pytest.mark.parametrize("players", [1, 2, 3, 5])
def test_exact_is_the_mean_over_all_orders(players):
    game = Arbitrary(players)
    total = np.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        coalition = np.zeros((1, players), bool)
        before = game(coalition)[0]
        for player in order:
            coalition[0, player] = True
            after = game(coalition)[0]
            total[player] += after - before
            before = after
    np.testing.assert_allclose(last("exact", game, 2**players).values, total / len(orders), atol=1e-12)


def test_exact_knows_the_polynomials():
    for players in (4, 9, 16):
        game = third_order(players)
        np.testing.assert_allclose(last("exact", game, 2**players).values, game.shapley, atol=1e-9)


def test_exact_refuses_many_players():
    with pytest.raises(SmpqError, match="17 players are too many"):
        last("exact", additive(17), 10**9)


@pytest.mark.parametrize("name", ["antithetic", "leverage"])
@pytest.mark.parametrize("players", [2, 3, 10, 25])
def test_paired_designs_are_exact_for_second_order_games(name, players):
    rng = np.random.default_rng(0)
    terms = {pair: rng.normal() for pair in itertools.combinations(range(players), 2)}
    game = Polynomial(players, terms)
    found = last(name, game, 4 * players + 2)
    np.testing.assert_allclose(found.values, game.shapley, atol=1e-8)
    np.testing.assert_allclose(found.standard_errors, 0, atol=1e-6)


@pytest.mark.parametrize("players", [2, 3, 4, 7, 10])
def test_leverage_is_exact_once_every_pair_is_drawn_and_then_stops(players):
    game = Arbitrary(players)
    found = last("leverage", game, 10**6)
    np.testing.assert_allclose(found.values, last("exact", game, 2**players).values, atol=1e-9)
    np.testing.assert_allclose(found.standard_errors, 0, atol=1e-9)
    assert found.evaluations == 2**players


def test_leverage_never_asks_twice():
    asked = []

    class Spy(Arbitrary):
        def __call__(self, coalitions):
            asked.extend(row.tobytes() for row in coalitions)
            return super().__call__(coalitions)

    last("leverage", Spy(9), 400)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("budget", [150, 600])
def test_leverage_beats_permutations_under_noise(budget):
    """A noisy game of 30 players: pairs share every evaluation among all players (specs, section 2)."""

    class Noisy(Polynomial):
        def __call__(self, coalitions):
            seeds = [zlib.crc32(row.tobytes()) for row in np.packbits(coalitions, axis=1)]
            return super().__call__(coalitions) + 0.3 * np.array([np.random.default_rng(s).normal() for s in seeds])

    def error(name):
        return np.mean(
            [np.sum((last(name, Noisy(30, additive(30).terms), budget, s).values - additive(30).shapley) ** 2)
             for s in range(5)]
        )  # fmt: skip

    assert error("leverage") < 0.5 * error("antithetic")


def test_results_do_not_depend_on_the_batch():
    for name in ("permutation", "antithetic", "leverage"):
        one, two = (last(name, third_order(8), 200, batch=b) for b in (16, 1000))
        np.testing.assert_allclose(one.values, two.values, rtol=1e-12)
        assert one.evaluations == two.evaluations


class TestTruncated:
    def test_players_after_the_collapse_get_nothing(self):
        # removing any two of four players halves the value or worse
        game = Polynomial(4, {(i,): 1.0 for i in range(4)}, offset=0.0)
        found = last("truncated", game, 500, threshold=0.75)
        assert found.values.sum() == pytest.approx(2)  # two of four removals are seen in every permutation
        assert found.evaluations == game.spent < 500

    def test_more_evaluations_do_not_cure_the_bias(self):
        game = Polynomial(6, {(i,): 1.0 for i in range(6)}, offset=0.0)
        found = last("truncated", game, 20000)
        assert (np.abs(found.values - game.shapley) > 10 * found.standard_errors).any()

    def test_permutations_end_the_sampling(self):
        found = last("truncated", additive(6), 10**6, permutations=10)
        assert found.evaluations == 1 + 10 * 6

    def test_a_value_that_is_not_positive_is_refused(self):
        with pytest.raises(SmpqError, match="positive"):
            last("truncated", Polynomial(3, {(0,): 1.0}, offset=-5.0), 100)

    @pytest.mark.parametrize("wrong", [{"threshold": 1.0}, {"threshold": -0.1}, {"permutations": 1}])
    def test_settings_are_checked(self, wrong):
        with pytest.raises(SmpqError):
            registry.find("estimators", "truncated")(**wrong)


class TestAuto:
    @pytest.mark.parametrize(("budget", "choice"), [(64, "exact"), (63, "odd"), (25, "gaussian")])
    def test_by_budget(self, budget, choice):
        assert last("auto", third_order(6), budget).reason.startswith(f"{choice}: ")

    def test_by_what_left_out_pairs_say(self):
        assert last("auto", third_order(16), 400).reason.startswith("odd: of pairs left out it misses ")
        noise = Arbitrary(14)
        noise.table += (np.arange(2**14)[:, None] >> np.arange(14) & 1) @ np.arange(14)
        assert last("auto", noise, 2000).reason.startswith("leverage: of pairs left out it misses ")

    def test_it_is_the_estimator_that_it_names(self):
        for budget in (30, 100, 400):
            found = last("auto", third_order(9), budget)
            same = last(found.reason.partition(":")[0], third_order(9), budget)
            np.testing.assert_array_equal(found.values, same.values)
            np.testing.assert_array_equal(found.standard_errors, same.standard_errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(registry.names("estimators")) - {"exact", "truncated"}))
def test_intervals_of_95_percent_cover(name):
    """On games with interactions of every order, at budgets that leave something to be seen."""
    players, covered = 12, []
    inside = (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)
    for game_seed in range(6):
        rng = np.random.default_rng(game_seed)
        game = Arbitrary(players)
        game.table = -np.exp(-(inside @ rng.lognormal(-1, 0.7, players))) + 0.02 * rng.normal(size=len(inside))
        truth = last("exact", game, 2**players).values
        for seed in range(20):
            for budget in (100, 200, 400):
                try:
                    found = last(name, game, budget, seed)
                except SmpqError:
                    continue  # the budget is too small for it
                known = np.isfinite(found.standard_errors)
                covered += list((np.abs(found.values - truth) < 1.96 * found.standard_errors)[known])
    assert 0.90 < np.mean(covered) < 0.995, np.mean(covered)  # 0.99, as far as 120 runs can tell
