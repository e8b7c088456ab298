"""Games over an evaluator: which question a coalition asks of the network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import (
    Assignments,
    Budget,
    Coalitions,
    Evaluator,
    Game,
    Mixtures,
    SmpqError,
    Space,
    Table,
    TooFew,
    Values,
)


class IntervalGame:
    """Between two assignments: players are the slots that differ, a coalition's slots take `high`, the others `low`.

    `slots` [players] are the indices of the players' slots. Tied slots are players of their own: a coalition may part
    them, which is a question about the network and not a plan.

    Raises SmpqError where `low` and `high` are the same, ValueError where they are no assignments of the space.
    """

    def __init__(self, evaluator: Evaluator, low: Assignments, high: Assignments) -> None:
        self.evaluator = evaluator
        self.low = _assignment(evaluator.space, low, "low")
        self.high = _assignment(evaluator.space, high, "high")
        self.slots = np.flatnonzero(self.low != self.high)
        if not len(self.slots):
            raise SmpqError("interval game: low and high are the same assignment, there is nothing to attribute")
        self.players = len(self.slots)
        self._spent = 0.0
        self._parts: dict[int, tuple[tuple[float, IntervalGame], ...]] = {}  # with their shares, by how many

    @property
    def spent(self) -> int:
        """Coalitions asked; those of parts by their share of the samples."""
        return round(self._spent + sum(share * part.spent for parts in self._parts.values() for share, part in parts))

    def parts(self, most: int) -> tuple[tuple[float, IntervalGame], ...]:
        """At most so many games on samples of their own, with their shares: the value is the mean of theirs."""
        most = min(most, len(self.evaluator.groups))
        if most not in self._parts:
            parts = self.evaluator.parts(most)
            games = ((share, IntervalGame(part, self.low, self.high)) for share, part in parts if len(parts) > 1)
            self._parts[most] = tuple(games)
        return self._parts[most] or ((1.0, self),)

    def assignments(self, coalitions: Coalitions) -> Assignments:
        """The assignments [n, slots] that the coalitions [n, players] stand for."""
        inside = _coalitions(coalitions, self.players)
        rows = np.tile(self.low, (len(inside), 1))
        rows[:, self.slots] = np.where(inside, self.high[self.slots], self.low[self.slots])
        return rows

    def derivatives(self, points: Values) -> NDArray[np.float64]:
        """Of the value by each player's share, where all have the share `points` [n] of `high`: [n, players].

        Every point counts as an evaluation.
        """
        low, high = self.evaluator.space.one_hot(np.stack([self.low, self.high]))
        shares = np.asarray(points, np.float32)[:, None, None]
        found = self.evaluator.derivatives((1 - shares) * low + shares * high)
        self._spent += len(points)
        return np.asarray((found * (high - low)).sum(axis=2)[:, self.slots], np.float64)

    def __call__(self, coalitions: Coalitions) -> Values:
        """Values [n] of the coalitions [n, players]."""
        rows = self.assignments(coalitions)
        self._spent += len(rows)
        return np.asarray(self.evaluator(rows), np.float64)


class SupernetGame:
    """The supernet of SMPQ (arXiv 2508.03002): players are the (slot, candidate) pairs of a mixture softmax(alpha).

    `alpha` is [slots, candidates], `pairs` [players, 2] names slot and candidate of each player. A candidate outside
    the coalition gets weight 0 without renormalising, as in the paper. A slot must keep one candidate: an emptied slot
    keeps its strongest (the lowest width among equals). So the empty coalition is the network that the largest alpha
    chooses, the rule depends on the coalition alone and not on the order of removal, and the value moves least.

    Raises ValueError where alpha has another shape or is not finite.
    """

    def __init__(self, evaluator: Evaluator, alpha: Table) -> None:
        mask = evaluator.space.mask
        alpha = np.asarray(alpha, np.float64)
        if alpha.shape != mask.shape:
            raise ValueError(f"alpha: expected shape {mask.shape} [slots, candidates], got {alpha.shape}")
        if not np.isfinite(alpha[mask]).all():
            raise ValueError("alpha: must be finite for every candidate")
        alpha = np.where(mask, alpha, -np.inf)
        weights = np.exp(alpha - alpha.max(axis=1, keepdims=True))
        self.evaluator = evaluator
        self.weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        self.pairs = np.argwhere(mask)
        self.players = len(self.pairs)
        self.spent = 0
        self._strongest = np.arange(mask.shape[1]) == alpha.argmax(axis=1)[:, None]

    def mixtures(self, coalitions: Coalitions) -> Mixtures:
        """The mixtures [n, slots, candidates] that the coalitions [n, players] stand for."""
        inside = _coalitions(coalitions, self.players)
        keep = np.zeros((len(inside), *self.weights.shape), np.bool_)
        keep[:, self.pairs[:, 0], self.pairs[:, 1]] = inside
        keep |= ~keep.any(axis=2, keepdims=True) & self._strongest
        return np.where(keep, self.weights, np.float32(0))

    def __call__(self, coalitions: Coalitions) -> Values:
        """Values [n] of the coalitions [n, players]."""
        rows = self.mixtures(coalitions)
        self.spent += len(rows)
        return np.asarray(self.evaluator(rows), np.float64)


class BudgetGame:
    """The multi-choice game around a budget: what a (slot, candidate) is worth among assignments like the plan.

    Assignments are random walks of `moves` steps from `reference`: in each step one slot (or tied group) is raised a
    candidate, another lowered, or both, wherever the row stays within `budget`.

    Raises SmpqError where `reference` does not meet the budget, ValueError where it is no assignment of the space.
    """

    def __init__(self, evaluator: Evaluator, budget: Budget, reference: Assignments, moves: int | None = None) -> None:
        self.evaluator = evaluator
        self.budget = budget
        self.reference = _assignment(evaluator.space, reference, "reference")
        if not budget.feasible(self.reference)[0]:
            raise SmpqError("budget game: the reference assignment does not meet the budget")
        parent = budget.leaders(len(self.reference))
        self._units = (np.unique(parent)[:, None] == parent).astype(np.int8)  # [units, slots]
        self.moves = len(self._units) // 2 + 1 if moves is None else moves
        self.spent = 0

    def draw(self, n: int, rng: np.random.Generator) -> Assignments:
        """Assignments [n, slots] around the reference, all within the budget."""
        rows = np.tile(self.reference, (n, 1))
        highest = self.evaluator.space.highest()
        for _ in range(self.moves):
            raised, lowered = self._units[rng.integers(len(self._units), size=(2, n))]
            kind = rng.integers(3, size=(n, 1))  # 0: raise, 1: lower, 2: both
            moved = (rows + raised * (kind != 1) - lowered * (kind != 0)).astype(np.int8)
            good = ((moved >= 0) & (moved <= highest)).all(axis=1)
            good[good] = self.budget.feasible(moved[good])
            rows[good] = moved[good]
        return rows

    def main_effects(self, evaluations: int, rng: np.random.Generator) -> tuple[Table, Table]:
        """Value of each candidate against its slot's mean, and its standard error, both [slots, candidates].

        Ridge regression on the one-hot assignments. The strength of the ridge maximises the marginal likelihood, and
        the errors are the posterior's: a direction that the budget hardly lets vary stays as uncertain as the prior.
        A candidate that does not exist or was never drawn has value -inf (the negated table tells a solver that it is
        not allowed) and error +inf.

        Raises SmpqError with fewer evaluations than slots + 2.
        """
        slots, width = self.evaluator.space.mask.shape
        if evaluations < slots + 2:
            raise TooFew(
                f"evaluations: {evaluations} are too few for a budget game of {slots} slots; it needs {slots + 2}"
            )
        rows = self.draw(evaluations, rng)
        self.spent += evaluations
        values = np.asarray(self.evaluator(rows), np.float64)

        one_hot = (rows[:, :, None] == np.arange(width)).reshape(evaluations, -1)
        share = one_hot.mean(axis=0)
        drawn = share > 0
        effects, covariance = _ridge(one_hot[:, drawn] - share[drawn], values - values.mean())
        slot = np.repeat(np.arange(slots), width)[drawn]
        centre = np.eye(len(slot)) - (slot[:, None] == slot) * share[drawn]  # minus the mean over the slot's draws
        table, errors = np.full(slots * width, -np.inf), np.full(slots * width, np.inf)
        table[drawn] = centre @ effects
        errors[drawn] = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", centre, covariance, centre), 0))
        return table.reshape(slots, width), errors.reshape(slots, width)


class Remainder:
    """What an additive surrogate leaves unexplained of a game: its value minus `coalitions @ weights`.

    The Shapley values of the surrogate are its `weights` [players]; add them to those of the remainder. Standard
    errors carry over as they are.

    Raises ValueError where there is not one finite weight per player.
    """

    def __init__(self, game: Game, weights: Values) -> None:
        self.game = game
        self.weights = np.asarray(weights, np.float64)
        if self.weights.shape != (game.players,) or not np.isfinite(self.weights).all():
            raise ValueError(f"weights: expected {game.players} finite numbers, got shape {self.weights.shape}")
        self.players = game.players
        self.spent = 0
        if hasattr(game, "derivatives"):  # 'control' looks whether there are any
            self.derivatives = self._derivatives

    def _derivatives(self, points: Values) -> NDArray[np.float64]:
        """Of the value by each player's share, [n, players]."""
        self.spent += len(points)
        return np.asarray(self.game.derivatives(points) - self.weights, np.float64)  # type: ignore[attr-defined]

    def __call__(self, coalitions: Coalitions) -> Values:
        """Values [n] of the coalitions [n, players]."""
        inside = _coalitions(coalitions, self.players)
        self.spent += len(inside)
        # a row's sum must not depend on how many rows were asked with it, as a matrix product's would
        return np.asarray(self.game(inside) - (inside * self.weights).sum(axis=1), np.float64)


def _assignment(space: Space, assignment: Assignments, name: str) -> Assignments:
    row = np.asarray(assignment)
    if row.shape != (len(space.slots),) or row.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected {len(space.slots)} integers, got {row.dtype} of shape {row.shape}")
    if (row < 0).any() or (row > space.highest()).any():
        raise ValueError(f"{name}: names a candidate that its slot does not have")
    return row.astype(np.int8)


def _coalitions(coalitions: Coalitions, players: int) -> Coalitions:
    rows = np.asarray(coalitions)
    if rows.ndim != 2 or rows.shape[1] != players or rows.dtype != np.bool_:
        raise ValueError(f"coalitions: expected bool [n, {players}], got {rows.dtype} of shape {rows.shape}")
    return rows


def _ridge(x: NDArray[np.float64], y: Values) -> tuple[Values, NDArray[np.float64]]:
    """Posterior mean [k] and covariance [k, k] of the effects of centred x [n, k] on centred y [n]."""
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    seen = left.T @ y
    rest = max(float(y @ y - seen @ seen), 0.0)
    power = singular**2
    best = (np.inf, 1.0, 0.0)
    for ridge in max(float(power.mean()), 1e-300) * np.logspace(-8, 8, 65):
        shrunk = 1 + power / ridge
        noise = (float((seen**2 / shrunk).sum()) + rest) / (len(y) - 1)
        best = min(best, ((len(y) - 1) * np.log(max(noise, 1e-300)) + float(np.log(shrunk).sum()), ridge, noise))
    _, ridge, noise = best
    effects = right.T @ (singular / (power + ridge) * seen)
    covariance = noise / ridge * (np.eye(x.shape[1]) - (right.T * (power / (power + ridge))) @ right)
    return effects, covariance
