"""Coalitions of width choices: microseconds for one coalition and one sample, loss included, on two threads.

"chains": prefixes of random orders, each slot falling from the highest width to the lowest ("interval"), or by one
width at a time ("steps"); "random": coalitions that share nothing but chance; "pairs": two slots lowered at once, as
CLADO needs; "mixtures": the supernet game of SMPQ, every mixture of five widths, along removal orders; "fixed point":
with mixture_bits=16. "ours" evaluates all rows of a game; the loops cost the same for any row and evaluate a few. B2,
B3, B4, B5: see benchmarks/baselines.py. All sides take turns and the ratios are of medians. "int8 limit": onednn's int8
convolutions alone, codes in, codes out, for the distinct work of the game. "difference": the largest of our losses from
those of B4 (B2 for mixtures), as a share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import smpq_ext
from benchmarks import data, models
from benchmarks.baselines import Baseline
from benchmarks.timing import interleaved, keep_freed_memory, seconds
from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.games import SupernetGame

THREADS, ROUNDS, ORDERS = 2, 3, 8
BITS = (2, 3, 4, 6, 8)
Rows = NDArray[Any]


@functools.cache
def evaluators(name: str) -> TorchEvaluator:
    """The model's evaluator, every slot searched."""
    settings: dict[str, Any] = {"bits": BITS, "fixed": {}, "renormalize": "re-estimated" in name}
    if name.endswith("fixed point"):
        settings["mixture_bits"] = 16
    if name.startswith("ResNet-20"):
        x, y = data.cifar10_kept_out()
        return smpq_ext.evaluator(models.load_resnet20_jpeg(), [(x[:256], y[:256])], **settings)
    if name.startswith("MobileNet"):
        x, y = data.imagenet_sample(step=32)
        return smpq_ext.evaluator(models.load_mobilenet(), [(x, y)], **settings)
    if name == "stories260K, weights":
        searched, _ = data.experiment_stories()
        return smpq_ext.evaluator(models.load_llama(), [searched], **settings, activation_bits=())
    if name == "stories260K":
        searched, _ = data.experiment_stories()
        return smpq_ext.evaluator(models.load_llama(), [searched], **settings)
    assert name == "ViT"
    x, y = data.cifar10_kept_out()
    return smpq_ext.evaluator(models.random_vit(), [(x[:64], y[:64])], **settings)


def chains(ev: TorchEvaluator, steps: bool, rng: np.random.Generator) -> Rows:
    """ORDERS walks from all slots at the highest width to all at the lowest; single steps: one walk."""
    high = ev.space.highest()
    found = []
    for _ in range(1 if steps else ORDERS):
        row = high.copy()
        found.append(row.copy())
        for slot in rng.permutation(np.repeat(np.arange(len(high)), high if steps else 1)):
            row[slot] = row[slot] - 1 if steps else 0
            found.append(row.copy())
    return np.array(found, np.int8)


def pairs(ev: TorchEvaluator, rng: np.random.Generator, most: int = 400) -> Rows:
    """All pairs of slots at the lowest width, the others at the highest; `most` of them."""
    first, second = np.triu_indices(len(ev.slots), 1)
    chosen = np.sort(rng.permutation(len(first))[:most])
    rows = np.repeat(ev.space.highest()[None], len(chosen), axis=0)
    rows[np.arange(len(chosen)), first[chosen]] = 0
    rows[np.arange(len(chosen)), second[chosen]] = 0
    return rows.astype(np.int8)


def mixtures(ev: TorchEvaluator, rng: np.random.Generator) -> Rows:
    """One removal order of the supernet game, thinned to every fourth coalition."""
    game = SupernetGame(ev, np.zeros(ev.space.mask.shape))
    order = rng.permutation(game.players)
    inside = np.ones((game.players + 1, game.players), np.bool_)
    for k, player in enumerate(order):
        inside[k + 1 :, player] = False
    return game.mixtures(inside[::4])


GAMES: dict[str, Callable[[TorchEvaluator, np.random.Generator], Rows]] = {
    "chains, interval": lambda ev, rng: chains(ev, False, rng),
    "chains, steps": lambda ev, rng: chains(ev, True, rng),
    "random": lambda ev, rng: rng.integers(0, ev.space.highest() + 1, (64, len(ev.slots))).astype(np.int8),
    "pairs": pairs,
    "mixtures": mixtures,
}
CASES = [
    *(("ResNet-20", game) for game in GAMES),
    *(("ResNet-20, re-estimated", game) for game in ("chains, interval", "random", "mixtures")),
    *((f"ResNet-20{kind}, fixed point", "mixtures") for kind in ("", ", re-estimated")),
    *(("MobileNet v1", game) for game in ("chains, interval", "random", "mixtures")),
    *(("MobileNet v1, re-estimated", game) for game in ("chains, interval",)),
    *(("stories260K, weights", game) for game in ("chains, interval", "random")),
    *(("stories260K", game) for game in ("chains, interval", "random", "mixtures")),
    *(("ViT", game) for game in ("chains, interval", "random", "mixtures")),
]
COMPILED = {"chains, interval"}  # where B3 and B5 stand beside: their time does not depend on the rows


def distinct_rows(ev: TorchEvaluator, rows: Rows) -> dict[int, int]:
    """How many rows every layer runs for, over all batches of coalitions, by its index in the executor."""
    executor = ev._executor
    lockstep = executor.lockstep
    assert lockstep is not None
    assigned = rows.ndim == 2
    order = np.lexsort(rows.T[::-1]) if assigned else np.arange(len(rows))
    count = dict.fromkeys(range(len(executor.layers)), 0)
    for first in range(0, len(rows), ev.rows_per_batch):
        chunk = rows[order[first : first + ev.rows_per_batch]]
        with executor.loaded(ev.space.one_hot(chunk.astype(np.int64)) if assigned else chunk):
            for step in lockstep.graph.steps:
                if step.layer is not None:
                    count[step.layer] += len(lockstep.rows[step.place].coalition)
    return count


def int8_limit(ev: TorchEvaluator, rows: Rows) -> float | None:
    """Seconds of onednn's int8 convolutions for the distinct work of the rows; None where there are other layers."""
    executor = ev._executor
    lockstep = executor.lockstep
    if lockstep is None or not all(isinstance(m, nn.Conv2d) for m in list(ev.layers.values())[:-1]):
        return None
    count = distinct_rows(ev, rows)
    total = 0.0
    size = ev.batches[0].size
    for k, step in ((s.layer, s) for s in lockstep.graph.steps if s.layer is not None):
        m: Any = executor.layers[k].module
        if isinstance(m, nn.Linear):
            continue
        shape = [size, *lockstep.graph.kinds[step.operands[0]][0][1:]]
        x = torch.randint(0, 256, shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        weight, scales = torch.randint(-127, 128, m.weight.shape, dtype=torch.int8), torch.full((len(m.weight),), 0.01)
        geometry = [list(g) for g in (m.stride, m.padding, m.dilation)]
        packed = torch.ops.onednn.qconv_prepack(weight, scales, 0.1, 0, *geometry, m.groups, shape)
        zeros = torch.zeros(len(m.weight), dtype=torch.int32)
        run = functools.partial(
            torch.ops.onednn.qconv_pointwise,
            *(x, 0.1, 0, packed, scales, zeros, None, *geometry, m.groups, 0.2, 0, torch.uint8, "relu", [], ""),
        )
        run()
        total += count[k] * sorted(seconds(run) for _ in range(5))[2]
    return total


@pytest.mark.parametrize(("model", "game"), CASES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def test_engine(benchmark: Any, table: list[dict[str, Any]], model: str, game: str) -> None:
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        row = measure(benchmark, model, game)
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info.update(row)
    table.append(row)


def measure(benchmark: Any, model: str, game: str) -> dict[str, Any]:
    if data.data_folder() is None:
        pytest.skip("SMPQ_DATA names no folder of data and models")
    ev = evaluators(model)
    rows = GAMES[game](ev, np.random.default_rng(0))
    if benchmark.disabled:
        rows = rows[:: max(1, len(rows) // 3)][:3]
    kinds = ["B2 mixture"] if rows.ndim == 3 else ["B2", "B4", *(["B3", "B5"] if game in COMPILED else [])]
    few = {kind: rows[: 8 if kind == "B5" else 2] for kind in kinds}
    baselines = {kind: Baseline(ev, kind) for kind in kinds}
    checked = rows[:: max(1, len(rows) // 4)]
    theirs = baselines["B4" if "B4" in baselines else kinds[0]].losses(checked)
    difference = float(np.abs(-ev(checked) / theirs - 1).max())
    assert difference < 0.2, "another function, not another rounding"
    sides: dict[str, Callable[[], object]] = {"ours": lambda: ev(rows)}
    sides |= {kind: functools.partial(b.losses, few[kind]) for kind, b in baselines.items()}
    times = interleaved(sides, 1 if benchmark.disabled else ROUNDS)
    benchmark.pedantic(sides["ours"], rounds=1)
    samples = ev.batches[0].size
    each = {kind: 1e6 * t / (len(few.get(kind, rows)) * samples) for kind, t in times.items()}
    limit = int8_limit(ev, rows) if rows.ndim == 2 else None
    return {
        "model": model,
        "game": game,
        "rows": len(rows),
        **{f"{kind.split()[0]} µs": value for kind, value in each.items()},
        **{f"vs {kind.split()[0]}": value / each["ours"] for kind, value in each.items() if kind != "ours"},
        "int8 limit µs": None if limit is None else 1e6 * limit / (len(rows) * samples),
        "difference": difference,
    }
