"""Resident memory of a process over thousands of evaluations.

ResNet-20, 512 images, random assignments and mixtures by turns, ten at a time: the worst for a heap, for no two batches
have the same tree of distinct layers. "store": every evaluation is kept in an SQLite file, as `search(store=...)` does.
"resident": of the process, in MiB; "growth": since 200 evaluations.

    python -m benchmarks.soak [--evaluations 4000]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import smpq_ext
from benchmarks import data, models
from benchmarks.bench_engine import BITS, THREADS
from benchmarks.environment import note_of, save_table
from smpq_ext.store import MemoryStore, Recorded, SqliteStore

WARM, EVERY = 200, 200  # evaluations


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def soak(ev: Recorded, evaluations: int) -> list[dict[str, Any]]:
    """A row for every 200 evaluations."""
    rng, rows = np.random.default_rng(0), []
    highest, width = ev.space.highest(), ev.space.width_count
    for k in range(1, evaluations // 10 + 1):
        if k % 2:
            ev(rng.integers(0, highest + 1, (10, len(highest))).astype(np.int8))
        else:
            ev(rng.dirichlet((1,) * width, (10, len(highest))).astype(np.float32))
        if 10 * k % EVERY == 0:
            rows.append({"evaluations": 10 * k, "resident": resident()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=4000)
    parser.add_argument("--arm", choices=("memory", "file"), help="of these alone, as JSON")
    given = parser.parse_args()
    if given.arm:
        torch.set_num_threads(THREADS)
        x, y = data.cifar10_kept_out()
        model, batches = models.load_resnet20_jpeg(), [(x[:512], y[:512])]
        with tempfile.TemporaryDirectory() as folder:
            store = MemoryStore() if given.arm == "memory" else SqliteStore(Path(folder) / "evaluations.sqlite")
            ev = Recorded(smpq_ext.evaluator(model, batches, bits=BITS, renormalize=False), store)
            print(json.dumps(soak(ev, given.evaluations)))
        return
    table = []
    for arm in ("memory", "file"):  # each in a process of its own: a heap remembers
        command = [sys.executable, "-m", "benchmarks.soak", "--evaluations", str(given.evaluations), "--arm", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows = json.loads(done.stdout)
        warm = next(row["resident"] for row in rows if row["evaluations"] == WARM)
        table += [{"store": arm, **row, "growth, %": 100 * (row["resident"] / warm - 1)} for row in rows]
    save_table("soak", table, note_of(__doc__))


if __name__ == "__main__":
    main()
