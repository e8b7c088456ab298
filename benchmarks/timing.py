"""Fair timing: the sides of a comparison take turns, so that drift of the machine meets them all alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from smpq_ext.engine.memory import keep_freed


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, float]:
    """Median seconds of every side; each round calls all of them, every second round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            elapsed = clock(sides[name])
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def keep_freed_memory(mib: int = 1024) -> None:
    """Let freed memory be used again, as the engine does, so that no side of a comparison pays for page faults.

    These cost about as much as the copy of a large tensor, and hide what a kernel itself does. The first `mib` are
    faulted in at once. Lasts for the whole process.
    """
    keep_freed(keep_freed_memory)
    torch.ones(mib << 20, dtype=torch.uint8)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
