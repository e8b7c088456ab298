"""Coalitions a second: the engine beside loops over torch's ops (B2), a bank of weights (B4) and CUDA graphs (B6)."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import smpq_ext
from benchmarks import bench_engine, models
from benchmarks.baselines import Baseline
from benchmarks.gpu.events import seconds
from benchmarks.gpu.ops import Case
from benchmarks.timing import interleaved
from smpq_ext.engine.evaluator import TorchEvaluator

OURS = "smpq::"  # in the names of our kernels
ROUNDS, FEW, MOST_ROWS = 3, 2, 400
Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]


def images(model: Callable[[], nn.Module], count: int, size: int, classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    return model(), torch.randn(count, 3, size, size), torch.randint(0, classes, (count,))


def vit_b() -> nn.Module:
    return models.ViT(dim=768, layers=12, heads=12, patch=16, size=224)


def decoder() -> tuple[nn.Module, Tensor, Tensor]:
    """1.1 billion weights."""
    model = models.Llama(layers=22, dim=2048, heads=32, kv_heads=4, hidden=5632, vocabulary=32_000)
    ids = torch.randint(0, 32_000, (8, 257))
    return model, ids[:, :-1], ids[:, 1:].contiguous()


# With random weights: speed does not depend on them. What is wanted of the chains, by ratio.
MODELS: dict[str, tuple[Make, dict[str, float]]] = {
    "ResNet-20": (functools.partial(images, models.ResNet20, 256, 32, 10), {"vs B2": 30, "vs B4": 10, "vs B6": 10}),
    "ResNet-50": (functools.partial(images, models.resnet50, 64, 224, 1000), {"vs B4": 5}),
    "ViT-B": (functools.partial(images, vit_b, 64, 224, 10), {"vs B4": 5}),
    "decoder of 1.1 billion": (decoder, {}),
}
CHAINS = "chains, interval"
GAMES = (CHAINS, "random", "mixtures")


def evaluator(make: Make, device: torch.device) -> TorchEvaluator:
    torch.manual_seed(0)
    model, x, y = make()
    settings: dict[str, Any] = {"bits": bench_engine.BITS, "fixed": {}, "renormalize": False}
    return smpq_ext.evaluator(model.eval().to(device), [(x.to(device), y.to(device))], **settings)


def cases(device: torch.device, products: float) -> Iterator[Case]:
    """Every case by name, to be run; `products`: that a bfloat16 matrix product makes in a second."""
    for name, (make, goals) in MODELS.items():
        known = functools.cache(functools.partial(evaluator, make, device))
        for game in GAMES:
            wanted = goals if game == CHAINS else {}
            yield (
                f"{name}: {game}",
                lambda known=known, game=game, wanted=wanted: measure(known(), game, wanted, products),
            )
        known.cache_clear()
        _forget()


def measure(ev: TorchEvaluator, game: str, goals: dict[str, float], products: float) -> dict[str, Any]:
    """Each loop in turn with ours, and not all of them at once: a bank of weights is five models large."""
    coalitions = bench_engine.GAMES[game](ev, np.random.default_rng(0))[:MOST_ROWS]
    mixed = coalitions.ndim == 3
    each = ["B2 mixture"] if mixed else ["B2", "B4", *(["B6"] if ev.device.type == "cuda" else [])]
    row: dict[str, Any] = {"samples": ev.batches[0].size, "rows": len(coalitions)}
    ours, ratios = [], {}
    for kind in each:
        loop = Baseline(ev, kind)
        own, theirs = -ev(coalitions[:FEW]), loop.losses(coalitions[:FEW])
        if not np.abs(own / theirs - 1).max() < 0.2:
            raise AssertionError(f"{kind} computes something else: {own}, {theirs}")
        took, its = _in_turn(functools.partial(ev, coalitions), functools.partial(loop.losses, coalitions[:FEW]), ev)
        ours.append(took / len(coalitions))
        ratios[f"vs {kind.split()[0]}"] = its / FEW / ours[-1]
        del loop
        _forget()
    if ev._executor.replay is not None:
        took, its = _in_turn(functools.partial(ev, coalitions), functools.partial(_without_replay, ev, coalitions), ev)
        ratios["vs no replay"] = its / took
    took = float(np.median(ours))
    row |= {"coalitions/s": 1 / took, **ratios, **_shares(ev, coalitions)}
    if not mixed and ev._executor.lockstep is not None:
        row["of bf16 rate"] = _products(ev, coalitions) / took / products
    if goals:
        row["wanted"] = ", ".join(f"{ratio} >= {least:g}" for ratio, least in goals.items())
        row["met"] = all(row.get(ratio, 0) >= least for ratio, least in goals.items())
    return row


def _in_turn(ours: Callable[[], object], theirs: Callable[[], object], ev: TorchEvaluator) -> tuple[float, float]:
    """Median seconds of each, after one round that is not counted."""
    clock = functools.partial(seconds, device=ev.device)
    found = interleaved({"ours": ours, "theirs": theirs}, ROUNDS, 1, clock)
    return found["ours"], found["theirs"]


def _without_replay(ev: TorchEvaluator, coalitions: NDArray[Any]) -> None:
    replay, ev._executor.replay = ev._executor.replay, None
    try:
        ev(coalitions)
    finally:
        ev._executor.replay = replay


def _products(ev: TorchEvaluator, coalitions: NDArray[Any]) -> float:
    """Of one coalition, after what coalitions share is shared."""
    slots = (*ev.space.slots, *(slot for slot, _ in ev.space.fixed))
    own = {slot.layer: slot.macs for slot in slots}
    counts = bench_engine.distinct_rows(ev, coalitions)
    each = sum(n * own[ev._executor.layers[k].name] for k, n in counts.items()) / len(coalitions)
    return each * ev.batches[0].size


def _shares(ev: TorchEvaluator, coalitions: NDArray[Any]) -> dict[str, float]:
    """Of the time: our kernels, those of libraries, and none at all."""
    if ev.device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        whole = seconds(functools.partial(ev, coalitions), ev.device)
    kernels = {event.key: event.self_device_time_total / 1e6 for event in seen.key_averages()}
    ours = sum(took for key, took in kernels.items() if OURS in key)
    busy = sum(kernels.values())
    return {"our kernels": ours / whole, "others": (busy - ours) / whole, "idle": max(0.0, 1 - busy / whole)}


def _forget() -> None:
    """What loops hold in circles, and what was compiled for them."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
