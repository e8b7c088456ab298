"""Coalitions a second: the engine beside loops over torch's ops (B2), a bank of weights (B4) and CUDA graphs (B6)."""

from __future__ import annotations

import functools
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
from smpq_ext.engine.evaluator import TorchEvaluator

OURS = "smpq::"  # in the names of our kernels
ROUNDS, FEW = 3, 2
Make = Callable[[], tuple[nn.Module, Tensor, Tensor]]


def resnet20() -> tuple[nn.Module, Tensor, Tensor]:
    return models.ResNet20(), torch.randn(256, 3, 32, 32), torch.randint(0, 10, (256,))


def resnet50() -> tuple[nn.Module, Tensor, Tensor]:
    from torchvision.models import resnet50 as make

    return make(weights=None), torch.randn(64, 3, 224, 224), torch.randint(0, 1000, (64,))


def vit_b() -> tuple[nn.Module, Tensor, Tensor]:
    model = models.ViT(dim=768, layers=12, heads=12, patch=16, size=224)
    return model, torch.randn(64, 3, 224, 224), torch.randint(0, 10, (64,))


def decoder() -> tuple[nn.Module, Tensor, Tensor]:
    """1.1 billion weights."""
    model = models.Llama(layers=22, dim=2048, heads=32, kv_heads=4, hidden=5632, vocabulary=32_000)
    ids = torch.randint(0, 32_000, (8, 257))
    return model, ids[:, :-1], ids[:, 1:].contiguous()


# With random weights, as they are made: speed does not depend on them.
CASES: dict[str, tuple[Make, dict[str, tuple[str, float]]]] = {  # what is wanted, by game
    "ResNet-20": (resnet20, {"vs B2": ("chains, interval", 30), "vs B4": ("chains, interval", 10)}),
    "ResNet-50, 224 px": (resnet50, {"vs B4": ("chains, interval", 5)}),
    "ViT-B, 224 px": (vit_b, {"vs B4": ("chains, interval", 5)}),
    "decoder, 1.1 billion": (decoder, {}),
}
GAMES = ("chains, interval", "random", "mixtures")
MOST_ROWS = 400


def evaluator(make: Make, device: torch.device) -> TorchEvaluator:
    torch.manual_seed(0)
    model, x, y = make()
    settings: dict[str, Any] = {"bits": bench_engine.BITS, "fixed": {}, "renormalize": False}
    return smpq_ext.evaluator(model.eval().to(device), [(x.to(device), y.to(device))], **settings)


def rows(device: torch.device, products: float | None) -> Iterator[dict[str, Any]]:
    for name, (make, goals) in CASES.items():
        ev = evaluator(make, device)
        for game in GAMES:
            yield measure(ev, name, game, goals, products)
        del ev
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    ev: TorchEvaluator, name: str, game: str, goals: dict[str, tuple[str, float]], products: float | None
) -> dict[str, Any]:
    """Of one model and game; `products`: that a bfloat16 matrix product makes in a second."""
    coalitions = bench_engine.GAMES[game](ev, np.random.default_rng(0))[:MOST_ROWS]
    mixed = coalitions.ndim == 3
    loops = {kind: Baseline(ev, f"{kind} mixture" if mixed else kind) for kind in (["B2"] if mixed else ["B2", "B4"])}
    if not mixed and ev.device.type == "cuda":
        loops["B6"] = Baseline(ev, "B6")
    sides: dict[str, Callable[[], object]] = {"ours": functools.partial(ev, coalitions)}
    sides |= {kind: functools.partial(loop.losses, coalitions[:FEW]) for kind, loop in loops.items()}
    replay = ev._executor.replay
    if replay is not None:
        sides["no replay"] = functools.partial(_without_replay, ev, coalitions)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(1 + ROUNDS):
        for side, run in sides.items():
            elapsed = seconds(run, ev.device)
            if turn:
                times[side].append(elapsed / (FEW if side in loops else len(coalitions)))
    each = {side: float(np.median(values)) for side, values in times.items()}
    row: dict[str, Any] = {
        "what": f"{name}: {game}",
        "samples": ev.batches[0].size,
        "rows": len(coalitions),
        "coalitions/s": 1 / each["ours"],
        **{f"vs {side}": value / each["ours"] for side, value in each.items() if side != "ours"},
        **_shares(ev, coalitions),
    }
    if not mixed and ev._executor.lockstep is not None and products:
        row["of bf16 rate"] = _products(ev, coalitions) / each["ours"] / products
    wanted = {ratio: least for ratio, (of, least) in goals.items() if of == game and ratio in row}
    if wanted:
        row["wanted"] = ", ".join(f"{ratio} >= {least:g}" for ratio, least in wanted.items())
        row["met"] = all(row[ratio] >= least for ratio, least in wanted.items())
    return row


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
