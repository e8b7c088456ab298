"""Seconds of calls on a device: by events on a GPU, by the clock elsewhere. Sides take turns; medians are quoted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.timing import interleaved

Side = Callable[[int], object]  # does the k-th of a row of calls, on operands of its own


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def medians(sides: Mapping[str, Side], calls: int, device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Median seconds of one call by side, `calls` in a row, launched one by one."""
    rows = {name: _row(side, calls) for name, side in sides.items()}
    return {name: value / calls for name, value in _of_rows(rows, device, rounds).items()}


def replayed(sides: Mapping[str, Side], calls: int, device: torch.device, rounds: int = 20) -> dict[str, float]:
    """As `medians`, the row of calls replayed as a CUDA graph: what the GPU takes, without the host's launches."""
    if device.type != "cuda":
        return medians(sides, calls, device, rounds)
    graphs = {}
    for name, side in sides.items():
        row = _row(side, calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            row()  # what is compiled, or chosen, the first time
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            row()
    found = _of_rows({name: graph.replay for name, graph in graphs.items()}, device, rounds)
    return {name: value / calls for name, value in found.items()}


def _of_rows(rows: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    return interleaved(rows, rounds, 3, partial(seconds, device=device))


def _row(side: Side, calls: int) -> Callable[[], None]:
    def run() -> None:
        _ = [side(k) for k in range(calls)]  # all results at once: each call writes to memory of its own

    return run
