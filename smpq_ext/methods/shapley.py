"""The default: single-slot scores, checked near the budget, and as much interaction as there turns out to be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature

import numpy as np
from numpy.typing import NDArray

from smpq_ext import registry, stopping
from smpq_ext.core import Answer, Assignments, Attribution, Evaluator, Problem, SmpqError, Table, TooFew, Values
from smpq_ext.games import IntervalGame, Remainder
from smpq_ext.methods.single import Scores, score_singles, singles, standard_error
from smpq_ext.methods.uniform import Uniform
from smpq_ext.solvers.anneal import Anneal
from smpq_ext.solvers.milp import Milp
from smpq_ext.surrogate import Surrogate, neighbours

__all__ = ["Shapley"]


class Shapley:
    """Adaptive search by Shapley values of the neighbourhood game, with single-slot scores as control variate.

    1. Single-slot damages on all samples, and the solver's plan for their sum.
    2. The neighbourhood game of that plan (every slot one step below or above it): Shapley values by paired leverage
       regression of what the scores miss. The same coalitions are measured on samples kept apart; the covariance of
       the two residuals is the variance that additive scores really miss, free of sampling noise.
    3. Where they miss nothing beyond the noise, the plan stands. Else the scores are rescaled by the Shapley values
       and solved again, and a Gaussian process learns from every assignment measured so far and proposes the next
       ones (Thompson sampling among feasible neighbours of the best).
    4. A refined plan, or the uniform one, is chosen only if it is the best on the samples of the search, and those kept
       apart, asked once, agree by at least a standard error.

    The attribution is that of step 2, around the single-slot plan, and `estimator` finds it. interactions: the game's
    pairs are estimated, too ('interactions'), from up to a quarter of the evaluations, and the refinement also starts
    from the plans that a quadratic solver finds for single slots and pairs as they may be within their errors. stop:
    end the game once every interval of 95 % leaves out 0 ("intervals"), or the rescaled plan is the same in 95 % of
    resamples ("plan"), see `smpq_ext.stopping`; the estimator is then 'odd' by default, which can answer sooner.
    'control' uses derivatives here and no parts, for what the game asked on all samples is used again.

    Raises SmpqError where there is no such estimator or stopping rule, the estimator is not for this game ('exact',
    'truncated'), or a number is out of range.
    """

    holdout = True

    def __init__(
        self,
        estimator: str = "",
        interactions: bool = False,
        stop: str = "",
        patience: float = 0.35,
        finalists: int = 8,
        batch: int = 12,
    ) -> None:
        if stop not in ("", "intervals", "plan"):
            raise SmpqError(f"stop: 'intervals' or 'plan', not {stop!r}")
        if interactions and estimator not in ("", "interactions"):
            raise SmpqError(f"estimator: {estimator!r} finds no interactions; leave it out with interactions=True")
        if not 0 < patience <= 1:
            raise SmpqError(f"patience: a share above 0, at most 1, not {patience!r}")
        self.estimator = estimator or ("interactions" if interactions else "odd" if stop else "leverage")
        registry.find("estimators", self.estimator)
        if self.estimator == "exact":
            raise SmpqError("estimator: 'exact' needs all coalitions, and about four a slot are asked; leave it out")
        if self.estimator == "truncated":
            raise SmpqError("estimator: 'truncated' needs values above 0, which those here may not be; leave it out")
        self.interactions, self.stop = interactions, stop
        self.patience = patience  # share of the refinement's evaluations without progress after which it stops
        self.finalists = finalists
        self.batch = batch  # assignments that are proposed and measured before the Gaussian process learns from them

    def allocate(self, problem: Problem) -> Answer:
        assert problem.holdout is not None
        search, apart = problem.evaluator, problem.holdout
        measured = 2 * len(singles(problem))
        if measured > problem.evaluations:
            raise TooFew(
                f"evaluations: {problem.evaluations} are too few to measure each slot alone, on the samples of the "
                f"search and on those kept apart; it needs {measured}"
            )
        solve = Milp()
        on_search, on_apart = score_singles(problem, search), score_singles(problem, apart)
        scores = _combine(on_search, on_apart, problem.apart)
        plan = solve(scores.damage, problem.budget)

        low = np.maximum(plan - 1, 0).astype(np.int8)
        high = np.minimum(plan + 1, problem.space.highest()).astype(np.int8)
        players = int((low != high).sum())
        if players < 3:
            few = f"{players} slots that can move are too few to look beyond single ones"
            return Answer(plan, scores.damage, scores.errors, float(scores.predict(plan)[0]), finding=few)
        left = problem.evaluations - measured - 2 * (self.finalists + 2)  # what the last comparison takes is set aside
        probes = min(32 + players, left // 4)
        pairs = min(2 * players + 1, (left - probes) // 2)
        if probes < 8 or pairs < 1 + min(2 * players, 2 ** (players - 1) - 1):
            few = (
                f"too few evaluations ({problem.evaluations}) to look beyond single slots; about "
                + str(measured + 2 * (self.finalists + 2) + 32 + 5 * players)
                + " are needed"
            )
            return Answer(plan, scores.damage, scores.errors, float(scores.predict(plan)[0]), finding=few)
        if self.interactions:
            pairs = max(pairs, (left - probes) // 8)
        near = _Neighbourhood(problem, scores, low, high)
        for step in near.play(self.estimator, 2 * pairs, players if self.stop else 256):
            if self._is_enough(problem, scores, near, step):
                break
        missed, error = _missed(near, probes, apart, on_search, on_apart)
        share = min(max(missed, 0.0), 1.0)  # the estimate may lie outside
        finding = f"additive scores miss {100 * share:.1f} ± {100 * error:.1f} % of the variance near the budget"
        finalists = Uniform().allocate(problem).assignment[None]
        if missed < 2 * error or missed < 0.01:
            finding = f"additive within {'noise' if missed <= 2 * error else '1 %'}: {finding}"
        else:
            starts = np.stack([plan, solve(scores.damage * near.ratio(near.attribution)[:, None], problem.budget)])
            if self.interactions:
                starts = np.concatenate([starts, self._quadratic(problem, scores, near)])
            starts = np.unique(starts[: max(left - near.game.spent - probes, 1)], axis=0)
            rows, losses = self._refine(problem, on_search, near, starts, left - near.game.spent - probes)
            best = rows[np.argsort(losses, kind="stable")]
            best = best[problem.budget.feasible(best)][: self.finalists]
            finalists = np.concatenate([finalists, best])
        chosen, verdict = _confirm(plan, finalists, search, apart)
        trace = tuple(zip(on_search.predict(near.asked.rows).tolist(), (-near.asked.values).tolist(), strict=True))
        return Answer(
            chosen,
            scores.damage,
            scores.errors,
            near.predict(on_search, chosen),
            near.attribution,
            trace,
            f"{finding}; {verdict}",
        )

    def _is_enough(self, problem: Problem, scores: Scores, near: _Neighbourhood, found: Attribution) -> bool:
        """Whether the rule says that the game need not be played on."""
        if self.stop == "intervals":
            return stopping.separated(found)
        if self.stop != "plan":
            return False

        certain = np.zeros(len(problem.space.slots))  # not shrunk, or the widest errors would make the stablest plan

        def plan_of(values: Values) -> Assignments:
            played = replace(near.attribution, values=values, standard_errors=certain)
            return Milp()(scores.damage * near.ratio(played)[:, None], problem.budget)

        return stopping.stable(near.attribution, plan_of, problem.rng(4, found.evaluations))

    def _quadratic(self, problem: Problem, scores: Scores, near: _Neighbourhood) -> Assignments:
        """Plans [finalists, slots] of least predicted loss, single slots and pairs being drawn within their errors."""
        rng, found = problem.rng(5), []
        for draw in range(self.finalists):
            table, pairwise = near.quadratic(scores, *near.draw(rng, scale=float(draw > 0)))
            found.append(Anneal(seed=draw)(table, problem.budget, pairwise))
        return np.stack(found)

    def _refine(
        self, problem: Problem, scores: Scores, near: _Neighbourhood, starts: Assignments, room: int
    ) -> tuple[Assignments, Values]:
        """Measure ever better assignments; returns all that were measured, [n, slots], with their losses [n]."""
        search, rng = problem.evaluator, problem.rng(3)
        surrogate = Surrogate(problem.space, scores.predict, scores.base)
        rows = np.concatenate([starts, near.asked.rows])
        losses = -np.concatenate([search(starts), near.asked.values])
        used, last_progress = len(starts), 0
        while used < room and used - last_progress < max(64, self.patience * room):
            feasible = problem.budget.feasible(rows)
            incumbents = rows[feasible][np.argsort(losses[feasible], kind="stable")[:6]]
            pool = neighbours(incumbents, problem.space, problem.budget, 1200, rng)
            known = {row.tobytes() for row in rows}
            pool = pool[[row.tobytes() not in known for row in pool]]
            if not len(pool):
                break
            surrogate.fit(rows, losses)
            draws = surrogate.sample(pool, min(self.batch, room - used), rng)
            chosen = pool[np.unique(draws.argmin(axis=1))]
            measured = -search(chosen)
            used += len(chosen)
            if measured.min() < losses[feasible].min():
                last_progress = used
            rows, losses = np.concatenate([rows, chosen]), np.concatenate([losses, measured])
            problem.progress("refinement", used, room)
        return rows, losses


class _Neighbourhood:
    """The neighbourhood game, played: Shapley values, and every assignment that was asked with its value."""

    def __init__(self, problem: Problem, scores: Scores, low: Assignments, high: Assignments) -> None:
        self.problem = problem
        self.game = IntervalGame(problem.evaluator, low, high)
        slots = self.game.slots
        self.gain = scores.damage[slots, low[slots]] - scores.damage[slots, high[slots]]
        self.asked = _Recorder(self.game)

    def play(self, estimator: str, budget: int, batch: int) -> Iterator[Attribution]:
        """Ask until the budget is spent, or the caller stops; yields what the players are worth, arrays [players]."""
        remainder = Remainder(self.asked, self.gain)
        rng, slots = self.problem.rng(2), self.game.slots
        kind = registry.find("estimators", estimator)
        settings = {"batch": batch} if "batch" in signature(kind).parameters else {}
        for step in _affordable(kind(**settings).steps(remainder, budget, rng)):
            total = len(self.problem.space.slots)
            values, errors = np.zeros(total), np.zeros(total)
            values[slots], errors[slots] = step.values + self.gain, step.standard_errors
            pairs = pair_errors = None
            if step.pairs is not None and step.pair_errors is not None:
                pairs, pair_errors = np.zeros((2, total, total))
                pairs[np.ix_(slots, slots)], pair_errors[np.ix_(slots, slots)] = step.pairs, step.pair_errors
            self.attribution = Attribution(values, errors, step.evaluations, step.reason, pairs, pair_errors)
            self.problem.progress("neighbourhood game", step.evaluations, budget)
            yield replace(step, values=values[slots])

    def ratio(self, played: Attribution) -> Values:
        """What each slot is worth here, [slots], in units of its single-slot score; shrunk by its standard error."""
        slots, found = self.game.slots, np.ones(len(played.values))
        measured = np.maximum(self.gain, 1e-12)
        weight = measured**2 / (measured**2 + played.standard_errors[slots] ** 2)
        found[slots] = np.clip(1 + weight * (played.values[slots] - self.gain) / measured, 0.2, 5.0)
        return found

    def draw(self, rng: np.random.Generator, scale: float) -> tuple[Values, Table]:
        """Values [slots] and pairs [slots, slots] as they may be within `scale` times their errors."""
        found = self.attribution
        assert found.pairs is not None and found.pair_errors is not None
        noise = np.triu(rng.standard_normal(found.pairs.shape), 1)
        errors, pair_errors = (np.where(np.isfinite(e), e, 0.0) for e in (found.standard_errors, found.pair_errors))
        values = found.values + scale * errors * rng.standard_normal(len(found.values))
        return values, found.pairs + scale * pair_errors * (noise + noise.T)

    def quadratic(self, scores: Scores, values: Values, pairs: Table) -> tuple[Table, NDArray[np.float64]]:
        """Damage of single slots [slots, candidates] and of pairs [slots, candidates, slots, candidates].

        A candidate between `low` and `high` has the share of the game's step that it has of the single-slot damage;
        what is outside is not allowed, for nothing was measured there.
        """
        game, (slots, width) = self.game, scores.damage.shape
        share = np.zeros((slots, width))
        allowed = np.zeros((slots, width), np.bool_)
        for slot in range(slots):
            low, high = int(game.low[slot]), int(game.high[slot])
            allowed[slot, low : high + 1] = True
            if low < high:
                steps = scores.damage[slot, low] - scores.damage[slot, low : high + 1]
                even = np.linspace(0, 1, high - low + 1)
                share[slot, low : high + 1] = np.clip(steps / steps[-1], 0, 1) if steps[-1] > 0 else even
        single = values - pairs.sum(axis=1) / 2  # what is left of a Shapley value is half of each of its pairs
        table = np.where(allowed, -single[:, None] * share, np.inf)
        return table, -pairs[:, None, :, None] * share[:, :, None, None] * share

    def predict(self, scores: Scores, assignment: Assignments) -> float:
        """The loss of an assignment near here: the line through what was measured, over the additive prediction."""
        line = np.stack([np.ones(len(self.asked.rows)), scores.predict(self.asked.rows)], axis=1)
        offset, slope = np.linalg.lstsq(line, -self.asked.values, rcond=None)[0]
        return float(offset + slope * scores.predict(assignment)[0])


def _affordable(steps: Iterator[Attribution]) -> Iterator[Attribution]:
    try:
        yield from steps
    except TooFew as error:
        raise TooFew(
            f"{error}; so many the neighbourhood game gets, about four a slot, however many the search may spend: "
            "leave `estimator` out"
        ) from error


class _Recorder:
    """A game that keeps the assignments [n, slots] it was asked, and their values [n]."""

    def __init__(self, game: IntervalGame) -> None:
        self.game, self.players = game, game.players
        self.rows: Assignments = np.empty((0, len(game.low)), np.int8)
        self.values: Values = np.empty(0)

    @property
    def spent(self) -> int:
        return self.game.spent

    def derivatives(self, points: Values) -> NDArray[np.float64]:
        return self.game.derivatives(points)

    def __call__(self, coalitions: NDArray[np.bool_]) -> Values:
        values = self.game(coalitions)
        self.rows = np.concatenate([self.rows, self.game.assignments(coalitions)])
        self.values = np.concatenate([self.values, values])
        return values


def _missed(
    near: _Neighbourhood, count: int, apart: Evaluator, on_search: Scores, on_apart: Scores
) -> tuple[float, float]:
    """Of `count` of the assignments that the game asked, evenly spread: both sides of the plan are among them."""
    count = min(count, len(near.asked.rows) - 2)
    index = np.linspace(2, len(near.asked.rows) - 1, count).round().astype(int)
    rows = near.asked.rows[index]
    predicted = on_search.predict(rows), on_apart.predict(rows)
    return missed_share((-near.asked.values[index], -apart(rows)), predicted)


def missed_share(losses: tuple[Values, Values], predicted: tuple[Values, Values]) -> tuple[float, float]:
    """Share of the variance of the loss that a line through the prediction leaves unexplained, and its standard error.

    Losses and predictions [n] of the same assignments on two disjoint sets of samples: both factors of a covariance
    come from different samples, so the noise of neither enters its mean.
    """
    count, residuals = len(losses[0]), []
    for measured, additive in zip(losses, predicted, strict=True):
        line = np.stack([np.ones(count), additive], axis=1)
        residuals.append(measured - line @ np.linalg.lstsq(line, measured, rcond=None)[0])
    products = residuals[0] * residuals[1]
    total = float(np.cov(*losses)[0, 1])
    if total <= 1e-12 * float(np.mean(losses[0] ** 2)):
        return 0.0, 0.0  # the loss is the same everywhere, as far as both parts can tell
    free = count - 2  # two coefficients were fitted
    return float(products.sum()) / free / total, float(products.std(ddof=1)) * np.sqrt(count) / free / total


def _combine(search: Scores, apart: Scores, share: float) -> Scores:
    """Scores on all samples, of which `share` are apart."""
    return Scores(
        (1 - share) * search.damage + share * apart.damage,
        np.hypot((1 - share) * search.errors, share * apart.errors),
        (1 - share) * search.base + share * apart.base,
    )


def _confirm(plan: Assignments, finalists: Assignments, search: Evaluator, apart: Evaluator) -> tuple[Assignments, str]:
    """The finalist that is best on the samples of the search, if those apart agree by a standard error, or the plan."""
    rows = np.concatenate([plan[None], finalists])
    best = int(np.argmin(-search(rows)))
    if best == 0:
        return plan, "no other plan is better"
    losses = -apart.by_group(rows[[0, best]])
    difference = losses[1] - losses[0]
    mean, error = float(difference @ apart.groups), standard_error(difference, apart.groups)
    said = f"loss {mean:+.3g} ± {error:.2g} on samples kept apart"
    if mean < -error:
        return rows[best], f"another plan is confirmed, {said}"
    if math.isinf(error):
        return plan, "no other plan can be confirmed: the samples kept apart are one group, give more, in more batches"
    return plan, f"no other plan is confirmed, the best has {said}"
