"""SMPQ (arXiv 2508.03002), a reconstruction: its paper gives neither hyper-parameters nor code.

What is not in the paper is taken from Shapley-NAS (arXiv 2206.09811) and from EdMIPS- and GMPQ-style supernets; where
a choice had to be made it is said below. No figure of the paper is claimed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smpq_ext.core import Answer, Attribution, Coalitions, Problem, TooFew, Values
from smpq_ext.engine.supernet import Supernet
from smpq_ext.estimators.truncated import Truncated
from smpq_ext.games import SupernetGame
from smpq_ext.solvers.milp import Milp

__all__ = ["Smpq"]


class Smpq:
    """A reconstruction: Shapley values of (slot, candidate) pairs in a trained supernet, by truncated permutations.

    The supernet trains its weights straight-through on the calibration data for half of the `epochs`. Before each
    epoch of the other half: permutations from the full set downwards on a fresh batch, values in percent of top-1
    accuracy, cut off below half of the full value; score = mean - std over the permutations, z-scored within weights
    and within activations; s <- 0.8 s + 0.2 z, alpha <- alpha + 0.1 s.

    Ours: the solver chooses by s under the budget (the paper's argmax knows none), evaluation is in eval mode,
    `evaluations` bounds the permutations (10 in the reference), and those of one epoch share a batch.
    """

    holdout = False

    def __init__(self, epochs: int = 16, permutations: int = 10, samples: int = 256, rate: float = 0.01) -> None:
        self.epochs, self.permutations, self.samples, self.rate = epochs, permutations, samples, rate

    def allocate(self, problem: Problem) -> Answer:
        space, engine = problem.space, problem.model
        net = Supernet(engine)
        mask, kinds = space.mask, np.array([s.kind for s in space.slots])
        alpha = np.zeros(mask.shape)
        score = np.zeros(mask.shape)
        total = sum(batch.size for batch in engine.batches)
        epoch = max(1, total // 64)
        players = int(mask.sum())
        if problem.evaluations < 2 * players + 1:
            raise TooFew(
                f"evaluations: {problem.evaluations} are too few for smpq; two permutations of {players} players need "
                f"{2 * players + 1}"
            )
        rounds = max(1, self.epochs // 2)
        net.train(_softmax(alpha, mask), (self.epochs - rounds) * epoch, 64, self.rate, problem.rng(1))
        spent = 0
        for k in range(rounds):
            permutations = min(self.permutations, (problem.evaluations - spent - 1) // players)
            if permutations < 2:
                break
            game = _MaskedAccuracy(net, SupernetGame(problem.evaluator, alpha), self.samples, problem.rng(2, k))
            sampler = Truncated(permutations=permutations, batch=permutations)
            *_, found = sampler.steps(game, problem.evaluations - spent, problem.rng(3, k))
            spent += game.spent
            raw = np.zeros(mask.shape)
            raw[mask] = found.values - found.standard_errors * np.sqrt(permutations)
            for kind in np.unique(kinds):
                part = mask & (kinds == kind)[:, None]
                raw[part] = (raw[part] - raw[part].mean()) / (raw[part].std() + 1e-12)
            score = 0.8 * score + 0.2 * np.where(mask, raw, 0.0)
            alpha = alpha + 0.1 * score
            net.train(_softmax(alpha, mask), epoch, 64, self.rate, problem.rng(4, k))
            problem.progress("supernet", k + 1, rounds)
        table = np.where(mask, -score, np.inf)
        chosen = Milp()(table, problem.budget)
        values = np.zeros(len(space.slots))
        np.add.at(values, np.argwhere(mask)[:, 0], found.values)
        variance = np.zeros(len(space.slots))
        np.add.at(variance, np.argwhere(mask)[:, 0], found.standard_errors**2)
        attribution = Attribution(values, np.sqrt(variance), spent)  # of the last epoch
        finding = "a reconstruction of SMPQ, not the authors' code"
        return Answer(chosen, table, attribution=attribution, finding=finding, evaluations=spent)


class _MaskedAccuracy:
    """The supernet game with top-1 accuracy on one batch as value."""

    def __init__(self, net: Supernet, game: SupernetGame, samples: int, rng: np.random.Generator) -> None:
        self.net, self.game, self.players, self.spent = net, game, game.players, 0
        self.part = net.draw(samples, rng)

    def __call__(self, coalitions: Coalitions) -> Values:
        self.spent += len(coalitions)
        return self.net.values(self.game.mixtures(coalitions), self.part)


def _softmax(alpha: NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    weights = np.where(mask, np.exp(alpha - alpha.max()), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
