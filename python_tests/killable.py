"""Runs one search per line of standard input, in a forked child that may be killed: tells its pid, then its status.

The parent never searches, so no child inherits a thread pool (HiGHS's or torch's) without its threads.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from test_methods import samples, trained

from smpq_ext import driver
from smpq_ext.engine.evaluator import TorchEvaluator


def child(net: torch.nn.Module, folder: Path) -> None:
    by_group = TorchEvaluator.by_group

    def logged(self: TorchEvaluator, rows: np.ndarray) -> np.ndarray:
        with (folder / "rows").open("a") as file:
            file.write(f"{len(rows)}\n")
        return by_group(self, rows)

    TorchEvaluator.by_group = logged
    result = driver.search(
        net,
        [samples(96, 1)],
        bits=(2, 3, 4, 8),
        budget="weight-bits=3,activation-bits=3",
        evaluations=250,
        loss="kl",
        store=folder / "evaluations.sqlite",
    )
    (folder / "plan").write_text(repr(result.plan.to_json()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = trained()
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(model, Path(line.strip()))
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
