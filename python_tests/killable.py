"""Runs a search for each line "folder batches seconds" of standard input, in a forked child; tells its wait status.

The child is killed that many seconds after it has begun that many batches more; 0 batches: it is left alone. The parent
never searches, so no child inherits a thread pool (HiGHS's or torch's) without its threads.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from test_methods import samples, trained

from smpq_ext import driver
from smpq_ext.core import Result
from smpq_ext.engine.evaluator import TorchEvaluator, evaluator


def search(net: torch.nn.Module, folder: Path) -> Result:
    """A search in many small batches, with its store in the folder."""
    driver.make_evaluator = functools.partial(evaluator, memory=1 << 20)
    return driver.search(
        net,
        [samples(96, 1)],
        bits=(2, 3, 4, 8),
        budget="weight-bits=3,activation-bits=3",
        evaluations=250,
        loss="kl",
        store=folder / "evaluations.sqlite",
    )


def child(net: torch.nn.Module, folder: Path) -> None:
    by_group = TorchEvaluator.by_group

    def logged(self: TorchEvaluator, rows: np.ndarray) -> np.ndarray:
        with (folder / "rows").open("a") as file:
            file.write(f"{len(rows)}\n")
        return by_group(self, rows)

    TorchEvaluator.by_group = logged
    result = search(net, folder)
    (folder / "plan").write_text(repr(result.plan.to_json()))


def outcome(net: torch.nn.Module, folder: Path, batches: int, seconds: float) -> int:
    log = folder / "rows"
    log.touch()
    last = log.read_text().count("\n") + batches
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(net, folder)
            code = 0
        finally:
            os._exit(code)
    while batches == 0 or log.read_text().count("\n") < last:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)  # nobody has waited for it yet, so the pid is still its own
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = trained()
    for line in sys.stdin:
        where, count, delay = line.rsplit(maxsplit=2)
        print(outcome(model, Path(where), int(count), float(delay)), flush=True)
