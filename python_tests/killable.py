"""Runs a search for each line "folder seconds" of standard input, in a forked child; tells its wait status.

The child is killed so many seconds after its start, or, with 0, left alone. The parent never searches, so no child
inherits a thread pool (HiGHS's or torch's) without its threads; but it makes the evaluator, which takes longer than a
search and touches no store. What `append` returned from is written to the file "reported".
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

import torch
from test_methods import samples, trained

from smpq_ext import driver
from smpq_ext.core import Result
from smpq_ext.engine.evaluator import evaluator
from smpq_ext.store import SqliteStore

BITS = (2, 3, 4, 8)


def search(net: torch.nn.Module, folder: Path, make: object = None) -> Result:
    """A search in many small batches, with its store in the folder."""
    driver.make_evaluator = make or functools.partial(evaluator, memory=1 << 20)
    return driver.search(
        net,
        [samples(96, 1)],
        bits=BITS,
        budget="weight-bits=3,activation-bits=3",
        evaluations=250,
        loss="kl",
        store=folder / "evaluations.sqlite",
    )


def child(net: torch.nn.Module, engine: object, folder: Path) -> None:
    append = SqliteStore.append

    def logged(self: SqliteStore, study: str, rows: dict) -> None:
        append(self, study, rows)
        with (folder / "reported").open("a") as file:
            file.write("".join(f"{study} {key.hex()}\n" for key in rows))

    SqliteStore.append = logged
    result = search(net, folder, lambda *args, **settings: engine)
    (folder / "plan").write_text(repr(result.plan.to_json()))


def outcome(net: torch.nn.Module, engine: object, folder: Path, seconds: float) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(net, engine, folder)
            code = 0
        finally:
            os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # nobody has waited for it yet, so the pid is still its own
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = trained()
    made = evaluator(model, [samples(96, 1)], bits=BITS, loss="kl", memory=1 << 20)
    for line in sys.stdin:
        where, delay = line.rsplit(maxsplit=1)
        print(outcome(model, made, Path(where), float(delay)), flush=True)
