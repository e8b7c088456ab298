"""What several ranks cost and bring: a search's batches on torch.distributed (gloo), beside one process.

"overhead": a batch of rows that cost nothing, so the time is that of sharing out, gathering and agreeing; median of
200. "ResNet-20": random assignments of weights and activations on 256 images, seconds for a batch of `rows`, every rank
with its share of the cores; one rank is a plain evaluator. Ranks on one machine share its memory bandwidth.

    python -m benchmarks.ranks [--ranks 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import note_of, save_table
from benchmarks.timing import seconds
from smpq_ext import distributed
from smpq_ext.core import Evaluator

ROWS = (8, 128)


class Nothing:
    """The evaluator's space and groups, and values that cost nothing."""

    def __init__(self, of: Evaluator) -> None:
        self.fingerprint, self.space, self.slots = of.fingerprint, of.space, of.slots
        self.groups, self.rows_per_batch = of.groups, of.rows_per_batch

    def by_group(self, rows: Any) -> Any:
        return np.zeros((len(rows), len(self.groups)))


def measure() -> None:
    """One rank; rank 0 prints what it measured as JSON."""
    from benchmarks.bench_engine import evaluators

    distributed.join("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.ranks()))
    ev = evaluators("ResNet-20")
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (max(ROWS), len(ev.slots))).astype(np.int8)
    found = []
    nothing, shared = distributed.shared(Nothing(ev)), distributed.shared(ev)  # type: ignore[arg-type]
    for count in ROWS:
        chosen = rows[:count]
        shared.by_group(chosen[:64])
        row = {"ranks": distributed.ranks(), "rows": count}
        row["overhead µs"] = 1e6 * statistics.median(seconds(lambda r=chosen: nothing.by_group(r)) for _ in range(200))
        row["ResNet-20 s"] = statistics.median(seconds(lambda r=chosen: shared.by_group(r)) for _ in range(3))
        found.append(row)
    if distributed.rank() == 0:
        print(json.dumps(found))
    distributed.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    given = parser.parse_args()
    table = []
    for count in given.ranks:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "benchmarks.ranks"]
        environment = os.environ | {"SMPQ_RANK_OF_BENCHMARK": "1", "OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            [sys.executable, *launch],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        table += json.loads(out.splitlines()[-1])
        print(out.splitlines()[-1], flush=True)
    save_table("ranks", table, note_of(__doc__))


if __name__ == "__main__":
    measure() if os.environ.get("SMPQ_RANK_OF_BENCHMARK") else main()
