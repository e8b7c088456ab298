"""Where the microseconds of coalitions go, one row for each game of bench_engine.

"µs": for one coalition and one sample, on two threads. "10⁶ MACs": products for one coalition and one sample, after
what coalitions share is shared. "10⁹ MACs/s": products in the whole time. "MKL": products a second of two float32
matrices of 2,048 x 2,048 in the same minute. Then the operations that take most of the time, by torch's profiler.

    python -m benchmarks.profile_engine
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_engine import CASES, GAMES, THREADS, distinct_rows, evaluators
from benchmarks.environment import note_of, save_table
from benchmarks.timing import keep_freed_memory, seconds

ROUNDS, SHOWN, SIZE = 3, 5, 2048


def products_of_mkl() -> float:
    """Float32 products a second."""
    a, b, out = (torch.rand(SIZE, SIZE) for _ in range(3))
    return SIZE**3 / min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))


def measure(model: str, game: str) -> dict[str, Any]:
    ev = evaluators(model)
    rows = GAMES[game](ev, np.random.default_rng(0))
    ev(rows)
    times = sorted(seconds(lambda: ev(rows)) for _ in range(ROUNDS))
    each = times[ROUNDS // 2] / (len(rows) * ev.batches[0].size)
    counts = distinct_rows(ev, rows)
    slots = (*ev.space.slots, *(slot for slot, _ in ev.space.fixed))
    own = {slot.layer: slot.macs for slot in slots}
    macs = sum(n * own[ev._executor.layers[k].name] for k, n in counts.items()) / len(rows)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ev(rows)
    events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
    whole = sum(e.self_cpu_time_total for e in events)
    shares = (f"{e.key.split('::')[-1]} {e.self_cpu_time_total / whole:.0%}" for e in events[:SHOWN])
    return {
        "model": model,
        "game": game,
        "µs": 1e6 * each,
        "10⁶ MACs": macs / 1e6,
        "10⁹ MACs/s": macs / each / 1e9,
        "MKL": products_of_mkl() / 1e9,
        "operations": ", ".join(shares),
    }


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    table = []
    for model, game in CASES:
        table.append(measure(model, game))
        print(table[-1], flush=True)
    save_table("profile_engine", table, note_of(__doc__))


if __name__ == "__main__":
    main()
