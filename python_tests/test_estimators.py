import itertools
import zlib

import numpy as np
import pytest
from contracts import EstimatorContract, Polynomial, additive, smallest_budget, third_order

from smpq_ext import registry
from smpq_ext.core import SmpqError, TooFew
from smpq_ext.estimators import interactions, leverage, odd
from smpq_ext.estimators.control import aumann_shapley
from smpq_ext.games import Remainder


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


@pytest.mark.parametrize("name", ["odd", "control"])
def test_a_size_of_which_one_pair_was_drawn_makes_no_error_infinite(name):
    for players in (6, 9, 12):
        found = last(name, third_order(players), 2 * players + 2)
        assert np.isfinite(found.standard_errors).all()


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
    def test_what_helps_is_taken(self):
        found = last("auto", InParts(12), 100)
        assert found.reason == "control: pairs on 4 parts of the samples and surrogates from derivatives"
        np.testing.assert_array_equal(found.values, last("control", InParts(12), 100).values)

    @pytest.mark.parametrize(("budget", "choice"), [(64, "exact"), (63, "odd"), (48, "odd"), (47, "gaussian")])
    def test_by_budget(self, budget, choice):
        assert last("auto", third_order(6), budget).reason.startswith(f"{choice}: ")

    def test_a_remainder_has_derivatives_where_its_game_has(self):
        plain, more = (Remainder(game, np.ones(9)) for game in (third_order(9), InParts(9)))
        assert last("auto", plain, 80).reason.startswith(("odd: ", "leverage: "))
        assert last("auto", more, 80).reason == "control: surrogates from derivatives"

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


class InParts:
    """A game that is the mean of `count` others, which differ a little; it knows its derivatives on the diagonal."""

    def __init__(self, players, count=4, seed=0, differ=0.3):
        rng = np.random.default_rng(seed)
        self.players = players
        self._inside = (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)
        weights = rng.lognormal(-1, 0.7, players)
        self._parts = [Arbitrary(players) for _ in range(count)]
        for part in self._parts:
            own = weights * rng.lognormal(0, differ, players)
            part.table = -np.exp(-(self._inside @ own)) * rng.lognormal(0, 0.2)
        self._asked = 0

    @property
    def spent(self):
        return self._asked + round(np.mean([part.spent for part in self._parts]))

    @property
    def table(self):
        return np.mean([part.table for part in self._parts], axis=0)

    def __call__(self, coalitions):
        self._asked += len(coalitions)
        return self.table[coalitions @ (1 << np.arange(self.players))]

    def parts(self, most):
        return [(1 / len(self._parts), part) for part in self._parts] if most >= len(self._parts) else [(1.0, self)]

    def derivatives(self, points):
        """Of the multilinear extension."""
        self._asked += len(points)
        found = []
        for share in points:
            chance = np.where(self._inside, share, 1 - share)
            found.append(
                [
                    ((2 * self._inside[:, i] - 1) * np.delete(chance, i, axis=1).prod(axis=1)) @ self.table
                    for i in range(self.players)
                ]
            )
        return np.array(found)


def truth(game):
    values = Arbitrary(game.players)
    values.table = game.table
    return last("exact", values, 2**game.players).values


def squared(found, exact):
    return ((found.values - exact) ** 2).sum() / (exact**2).sum()


class TestControl:
    def test_it_is_odd_for_a_game_that_offers_nothing(self):
        one, two = (
            list(registry.find("estimators", n)().steps(third_order(9), 300, np.random.default_rng(0)))[-1]
            for n in ("odd", "control")
        )
        np.testing.assert_array_equal(one.values, two.values)
        assert one.evaluations == two.evaluations and two.reason == "control: neither parts nor surrogates, as odd"

    def test_evaluations_are_kept_and_counted_with_parts_and_passes(self):
        for budget in (20, 60, 200):
            game = InParts(10)
            for found in registry.find("estimators", "control")(batch=32).steps(game, budget, np.random.default_rng(0)):
                assert found.evaluations == game.spent <= budget
            assert found.evaluations >= budget - 1

    def test_the_derivatives_of_a_game_are_its_aumann_shapley_values(self):
        game = InParts(8)
        exact = truth(game)
        found = aumann_shapley(game.derivatives, 5)  # the multilinear extension has order 8, its derivative 7
        np.testing.assert_allclose(found, exact, atol=1e-12)

    def test_weights_that_are_the_values_leave_nothing_to_find(self):
        game = additive(20)
        found = last("control", game, 30, weights=game.shapley)
        np.testing.assert_allclose(found.values, game.shapley, atol=0.005)

    @pytest.mark.parametrize("weights", [[1.0] * 8, np.ones((9, 1)), 1.0])
    def test_weights_for_other_players_are_refused(self, weights):
        with pytest.raises(SmpqError, match=r"^weights: one for each of 9 players, not \["):
            last("control", third_order(9), 100, weights=weights)

    @pytest.mark.parametrize("weights", [np.zeros(9), np.full(9, np.nan)])
    def test_weights_that_say_nothing_do_no_harm(self, weights):
        found = last("control", third_order(9), 200, weights=weights)
        np.testing.assert_array_equal(found.values, last("control", third_order(9), 200).values)
        assert found.reason == "control: neither parts nor surrogates, as odd"

    def test_once_everything_is_asked_of_every_part_it_is_exact(self):
        game = InParts(6)
        found = last("control", game, 1 + 2**6)
        assert found.reason.startswith("control: pairs on 4 parts")
        np.testing.assert_allclose(found.values, truth(game), atol=1e-9)
        np.testing.assert_allclose(found.standard_errors, 0, atol=1e-9)
        assert found.evaluations == 1 + 2**6

    def test_parts_and_derivatives_are_worth_evaluations(self):
        errors = {"odd": [], "control": []}
        for seed in range(8):
            game = InParts(12, seed=seed, differ=0.1)
            exact = truth(game)
            for name, found in errors.items():
                found.append(squared(last(name, game, 60, seed), exact))
        assert 4 * np.mean(errors["control"]) < np.mean(errors["odd"])

    @pytest.mark.slow
    def test_intervals_of_95_percent_cover_with_parts_and_passes(self):
        covered = []
        for seed in range(5):
            game = InParts(11, seed=seed)
            exact = truth(game)
            for run in range(8):
                for budget in (40, 80, 160):
                    found = last("control", game, budget, run)
                    covered += list(np.abs(found.values - exact) < 1.96 * found.standard_errors)
        assert 0.90 < np.mean(covered) < 0.995


INDICES = {"shapley": "SII", "banzhaf": "BII", "faithful": "FSII"}  # our name -> shapiq's


class TestInteractions:
    @pytest.mark.parametrize("index", INDICES)
    def test_once_everything_is_asked_they_are_those_of_shapiq(self, index):
        shapiq = pytest.importorskip("shapiq")
        game = Arbitrary(7)
        found = last("interactions", game, 10**6, index=index)
        exact = shapiq.ExactComputer(lambda rows: game(np.atleast_2d(rows)), 7)(index=INDICES[index], order=2)
        for i, j in itertools.combinations(range(7), 2):
            assert found.pairs[i, j] == pytest.approx(exact[(i, j)], abs=1e-8)
        np.testing.assert_allclose(found.pair_errors, 0, atol=1e-9)
        np.testing.assert_allclose(found.values, last("exact", game, 2**7).values, atol=1e-9)

    @pytest.mark.parametrize("index", INDICES)
    def test_a_second_order_game_is_found_whole(self, index):
        rng = np.random.default_rng(0)
        terms = {pair: rng.normal() for pair in itertools.combinations(range(12), 2)}
        found = last("interactions", Polynomial(12, terms), 400, index=index)
        expected = np.zeros((12, 12))
        for (i, j), weight in terms.items():
            expected[i, j] = expected[j, i] = weight
        np.testing.assert_allclose(found.pairs, expected, atol=1e-4)
        assert (np.diag(found.pairs) == 0).all() and (np.diag(found.pair_errors) == 0).all()

    def test_an_index_that_is_unknown_is_told_the_known_ones(self):
        with pytest.raises(SmpqError, match="'owen' is not known; there are shapley, banzhaf, faithful"):
            registry.find("estimators", "interactions")("owen")

    @pytest.mark.slow
    @pytest.mark.parametrize("index", INDICES)
    def test_intervals_of_95_percent_cover(self, index):
        players, covered, above = 10, [], np.triu_indices(10, 1)
        inside = (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)
        for game_seed in range(4):
            rng = np.random.default_rng(game_seed)
            game = Arbitrary(players)
            game.table = -np.exp(-(inside @ rng.lognormal(-1, 0.7, players))) + 0.02 * rng.normal(size=len(inside))
            exact = last("interactions", game, 2**players, index=index).pairs
            for seed in range(8):
                for budget in (130, 200, 400):
                    found = last("interactions", game, budget, seed, index=index)
                    np.testing.assert_allclose(found.pairs, found.pairs.T, atol=1e-9)
                    covered += list((np.abs(found.pairs - exact) < 1.96 * found.pair_errors)[above])
        assert 0.90 < np.mean(covered) < 0.995


@pytest.mark.parametrize("name", ["control", "odd", "gaussian", "interactions"])
@pytest.mark.parametrize("players", [8, 12])
def test_intervals_cover_at_the_least_budget_too(name, players):
    """Where a few pairs are all that tells of the noise; benchmarks/coverage.py has more games."""
    covered, wide = [], []
    for seed in range(30):
        weights = np.abs(np.random.default_rng(seed).normal(size=players))
        game = Arbitrary(players)
        inside = (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)
        game.table = 0.1 + 1 / (1 + np.exp(-(inside @ weights)))
        found = last(name, game, smallest_budget(registry.find("estimators", name)(), game), seed)
        error = np.abs(found.values - truth(game))
        covered += list(error < 1.96 * found.standard_errors)
        wide.append(np.sqrt(np.mean(found.standard_errors**2) / np.mean(error**2)))
    assert np.mean(covered) > 0.9 and np.median(wide) < 4


@pytest.mark.parametrize("share", odd.SHARES)
def test_the_prior_of_odd_is_that_of_its_kernel(share):
    """Shapley values are linear in the gaps: their covariances follow from the kernel of all gaps."""
    players = 5
    signs = np.array([(1.0, *rest) for rest in itertools.product([-1.0, 1.0], repeat=players - 1)])
    game, values = Arbitrary(players), np.empty((len(signs), players))
    for row, own in enumerate(signs):
        game.table = np.zeros(2**players)
        for side in (1, -1):
            game.table[int((side * own > 0) @ (1 << np.arange(players)))] = side / 2
        values[row] = truth(game)
    kernel = odd._parities(signs @ signs.T, players, share)
    np.testing.assert_allclose(values.T @ kernel, odd._owners(signs, share).T, atol=1e-12)
    np.testing.assert_allclose(np.diag(values.T @ kernel @ values), (1 - 2 / 3 * share) / players, atol=1e-12)


@pytest.mark.parametrize("players", range(2, 8))
def test_what_each_pair_counts_for(players):
    """In values and in interactions, and what their variances are where every pair's is 1: sums over all pairs."""
    pairs = leverage.population(players)
    order = leverage.draw_pairs(players, pairs, np.random.default_rng(0))
    rows = np.array([next(order) for _ in range(sum(pairs))])
    game = Arbitrary(players)
    worth, whole = (game(rows), game(~rows)), game(np.repeat([[False], [True]], players, axis=1))
    drawn = leverage.Drawn(rows, worth[0] - worth[1], worth[0] + worth[1], whole[1] - whole[0], whole.sum(), pairs)
    np.testing.assert_allclose(drawn.gaps @ drawn.owners + drawn.total / players, truth(game), atol=1e-12)
    np.testing.assert_allclose((drawn.owners**2).sum(axis=0), drawn.variance, atol=1e-12)
    signs = np.concatenate([drawn.signs, np.ones((1, players))])
    for index in ("shapley", "banzhaf"):
        exact = last("interactions", game, 2**players, index=index).pairs
        counts = interactions._second_difference(pairs, signs, signs[:, 0], index)[:, 1:]
        np.testing.assert_allclose(np.append(drawn.sums, drawn.ends) @ counts, exact[0, 1:], atol=1e-6)
        variance = (counts[:-1] ** 2).sum(axis=0) + odd.END * counts[-1] ** 2
        np.testing.assert_allclose(variance, interactions._variance(players, pairs, index), atol=1e-12)


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
                except TooFew:
                    continue
                known = np.isfinite(found.standard_errors)
                assert known.all() or name == "stratified"  # which needs two coalitions in every stratum
                covered += list((np.abs(found.values - truth) < 1.96 * found.standard_errors)[known])
    assert 0.90 < np.mean(covered) < 0.995, np.mean(covered)  # 0.99, as far as 120 runs can tell
