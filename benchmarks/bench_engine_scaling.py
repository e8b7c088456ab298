"""Time and memory against the number of coalitions: random assignments of ResNet-20, 64 images, two threads.

"memory MB": what torch holds at once during the call, under memory=256 MiB. "vs 8": the time for one coalition and one
image, as a multiple of that of eight coalitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import smpq_ext
from benchmarks import data, models
from benchmarks.timing import keep_freed_memory, seconds
from smpq_ext.engine.memory import Meter

COUNTS, THREADS, IMAGES = (1, 8, 64, 512), 2, 64


@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
def test_scaling(benchmark: Any, table: list[dict[str, Any]], renormalize: bool) -> None:
    if data.data_folder() is None:
        pytest.skip("SMPQ_DATA names no folder of data and models")
    keep_freed_memory()
    x, y = data.cifar10_kept_out()
    ev = smpq_ext.evaluator(
        models.load_resnet20_jpeg(),
        [(x[:IMAGES], y[:IMAGES])],
        **{"bits": (2, 3, 4, 6, 8), "fixed": {}, "renormalize": renormalize, "memory": 256 << 20},
    )
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (max(COUNTS), len(ev.slots))).astype(np.int8)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        found = []
        for count in COUNTS[:1] if benchmark.disabled else COUNTS:
            ev(rows[:count])
            times = sorted(seconds(lambda count=count: ev(rows[:count])) for _ in range(3))
            with Meter() as meter:
                ev(rows[:count])
            found.append((count, 1e6 * times[1] / (count * IMAGES), meter.peak / 2**20))
        benchmark.pedantic(lambda: ev(rows[:8]), rounds=1)
    finally:
        torch.set_num_threads(before)
    base = dict((c, t) for c, t, _ in found).get(8)
    for count, each, peak in found:
        table.append(
            {
                "statistics": "re-estimated" if renormalize else "kept",
                "coalitions": count,
                "µs": each,
                "vs 8": None if base is None else each / base,
                "memory MB": peak,
            }
        )
    assert all(peak < 256 for _, _, peak in found)
