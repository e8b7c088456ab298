"""Where interactions are real, and what evaluations that are spent on them buy.

"missed": share of the variance of the loss that the best line through additive single-slot scores leaves unexplained,
over 200 random coalitions of the neighbourhood game of the single-slot plan (every slot a step below or above it): 1
minus the squared correlation of loss and prediction, with products of two different ones of 16 groups of samples for
variances and covariances, so that what differs between samples by chance has no part in it (but for re-estimated
statistics, which are those of a half). ±: standard error, by jackknives over the groups and over the coalitions.
"supernet": coalitions of (slot, candidate) pairs of SMPQ's mixture; scores are what the loss rises by where one
candidate is taken out of the full set. The ViT has random weights.

    python -m benchmarks.interactions [--seeds 3] [--only missed|spent]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import smpq_ext
from benchmarks import data, models, search_resnet20, search_stories
from benchmarks.bench_engine import BITS, THREADS
from benchmarks.comparison import Cells, compare, judge_accuracy, summary
from benchmarks.environment import note_of, save_table
from benchmarks.timing import keep_freed_memory
from smpq_ext.budget import parse
from smpq_ext.core import Problem
from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.games import IntervalGame, SupernetGame
from smpq_ext.methods.single import singles
from smpq_ext.solvers.milp import Milp

COALITIONS = 200
COSTS = ("evaluations", "search")
BOTH = "weight-bits={0:g},activation-bits={0:g}"
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "ResNet-20, kept": (models.load_resnet20_jpeg, {"renormalize": False}, BOTH),
    "ResNet-20, re-estimated": (models.load_resnet20_jpeg, {"renormalize": True}, BOTH),
    "MobileNet v1": (models.load_mobilenet, {"renormalize": False}, BOTH),
    "ViT, random weights": (models.random_vit, {"loss": "kl"}, BOTH),
    "stories260K, weights": (models.load_llama, {"activation_bits": ()}, "weight-bits={0:g}"),
    "stories260K": (models.load_llama, {}, BOTH),
}
METHODS = {
    "gradient": {},
    "single": {},
    "shapley": {},
    "shapley, control": {"estimator": "control"},
    "shapley, interactions": {"interactions": True},
}


def samples(model: str) -> tuple[torch.Tensor, torch.Tensor]:
    if model.startswith("MobileNet"):
        return data.imagenet_sample(step=8)
    if model.startswith("stories"):
        return data.experiment_stories()[0]
    x, y = data.cifar10_kept_out()
    return x[:512], y[:512]


def halves(model: str) -> tuple[TorchEvaluator, TorchEvaluator]:
    make, settings, _ = MODELS[model]
    ev = smpq_ext.evaluator(make(), [samples(model)], bits=BITS, **settings)
    return ev.split(0.5, np.random.default_rng(0))


def of_slots(model: str, bits: float) -> dict[str, Any]:
    both = halves(model)
    space = both[0].space
    budget = parse(MODELS[model][2].format(bits), space)
    alone = singles(Problem(space, budget, both[0], None, both[0], 10**6, 0))
    base, *others = losses(both, alone)
    damage = np.zeros((*space.mask.shape, len(base)))  # [slots, candidates, groups]
    for row, loss in zip(alone[1:], others, strict=True):
        slot = int(np.flatnonzero(row != alone[0])[0])
        damage[slot, row[slot]] = loss - base
    plan = Milp()(np.where(space.mask, damage @ shares(both), np.inf), budget)
    around = np.maximum(plan - 1, 0).astype(np.int8), np.minimum(plan + 1, space.highest()).astype(np.int8)
    game = IntervalGame(both[0], *around)
    rows = game.assignments(coalitions(game.players))
    predicted = damage[np.arange(len(plan)), rows].sum(axis=1)
    share, error = missed(losses(both, rows), predicted, shares(both))
    return {"model": model, "budget": f"{bits:g} bits", "players": game.players, "missed": share, "±": error}


def of_supernet(model: str) -> dict[str, Any]:
    both = halves(model)
    game = SupernetGame(both[0], np.zeros(both[0].space.mask.shape))
    players = game.players
    rows = coalitions(players)
    alone = np.concatenate([np.ones((1, players), np.bool_), ~np.eye(players, dtype=np.bool_)])
    base, *others = losses(both, game.mixtures(alone))
    predicted = ~rows @ (np.stack(others) - base)
    share, error = missed(losses(both, game.mixtures(rows)), predicted, shares(both))
    return {"model": f"supernet of {model}", "budget": "–", "players": players, "missed": share, "±": error}


def losses(both: tuple[TorchEvaluator, TorchEvaluator], rows: NDArray[Any]) -> NDArray[np.float64]:
    """By coalition and group of samples, [n, groups]."""
    return -np.concatenate([ev.by_group(rows) for ev in both], axis=1)


def shares(both: tuple[TorchEvaluator, TorchEvaluator]) -> NDArray[np.float64]:
    return np.concatenate([ev.groups for ev in both]) / 2


def missed(
    losses: NDArray[np.float64], predicted: NDArray[np.float64], shares: NDArray[np.float64]
) -> tuple[float, float]:
    """The share of the variance that predictions [n, groups] miss, and its standard error."""

    def share(rows: Any, groups: Any) -> float:
        x, y, w = predicted[rows][:, groups], losses[rows][:, groups], shares[groups] / shares[groups].sum()
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)

        def covariance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
            return float((a @ w) @ (b @ w) - ((a * b).sum(axis=0) * w**2).sum())  # without products of one group

        return 1 - covariance(x, y) ** 2 / (covariance(x, x) * covariance(y, y))

    variance = 0.0
    every = [np.arange(count) for count in losses.shape]
    for axis, count in enumerate(losses.shape):
        without = [share(*(np.delete(e, k) if a == axis else e for a, e in enumerate(every))) for k in range(count)]
        variance += (count - 1) * float(np.var(without))
    return share(*every), variance**0.5


def coalitions(players: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(players) < rng.integers(1, players) for _ in range(COALITIONS)])


def spent(seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Searches at 2.5 bits by additive scores, by `shapley`, and by it with interactions, judged on held-out data."""
    searched, test = data.experiment_stories()
    tasks = {
        "ResNet-20, kept: top-1": (
            models.load_resnet20_jpeg(),
            judge_accuracy(*data.cifar10("test")),
            [task for task in search_resnet20.tasks(seeds, [2.5]) if task.group.startswith("kept")],
            1.0,
        ),
        "stories260K, weights: NLL": (
            models.load_llama(),
            search_stories.judge_nll(*test),
            list(search_stories.tasks(seeds, [2.5], searched)),
            -1.0,
        ),
    }
    rows = []
    for name, (model, judge, of_model, sign) in tasks.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for task in of_model:
            for method, settings in METHODS.items():
                cells = Cells(folder / method.replace(", ", "-"))
                kind = method.partition(",")[0]
                cell = cells.run(task.name, model, task.batches, judge, kind, **task.settings, **settings)
                assert cell is not None
                found.setdefault(method, []).append(cell)
        mean_of = {key: {m: float(np.mean([c[key] for c in cs])) for m, cs in found.items()} for key in COSTS}
        for method, cells_ in found.items():
            mean, error = summary(cells_)
            row = {"task, 2.5 bits": name, "method": method, "score": mean, "±": error}
            row |= {key: costs[method] for key, costs in mean_of.items()}
            row["gradient passes"] = row["search"] / mean_of["search"]["gradient"]
            for other in ("gradient", "single"):
                if method not in ("gradient", other):
                    gain, error = compare(cells_, found[other])
                    row |= {f"better than {other}": sign * gain, f"± ({other})": error}
            if method.startswith("shapley"):
                more = row["evaluations"] - mean_of["evaluations"]["single"]
                row["for 100 evaluations more than single"] = 100 * row["better than single"] / more
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=Path, default=Path.home() / ".cache/smpq_ext/interactions")
    parser.add_argument("--only", choices=("missed", "spent"))
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    if given.only != "spent":
        table = []
        for model in MODELS:
            for bits in (2.5, 3.0, 4.0):
                table.append(of_slots(model, bits))
                print(table[-1], flush=True)
        for model in ("ResNet-20, kept", "MobileNet v1"):
            table.append(of_supernet(model))
            print(table[-1], flush=True)
        save_table("interactions", table, note_of(__doc__))
    if given.only != "missed":
        note = (
            "What evaluations beyond single-slot scores bought on held-out data: searches at 2.5 bits as in "
            "search_resnet20.md and search_stories.md; differences are paired over seeds and held-out samples. search: "
            "seconds without calibration and the last check; gradient passes: in units of the search by gradients."
        )
        save_table("interactions_spent", spent(given.seeds, given.cells), f"{note} {given.seeds} seeds.")


if __name__ == "__main__":
    main()
