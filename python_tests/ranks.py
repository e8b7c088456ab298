"""What test_distributed.py starts under torchrun: `ranks.py task folder`; each rank writes rank<k>.json there."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
from killable import search
from test_methods import samples, trained

from smpq_ext import distributed
from smpq_ext.core import SmpqError
from smpq_ext.engine.evaluator import TorchEvaluator, evaluator
from smpq_ext.store import SqliteStore

computed: list[int] = []  # rows of each batch of this rank


def whole(folder: Path) -> dict:
    """A search; KILLS, "seed attempts": in each of the first attempts a random rank is killed, also before a batch."""
    by_group, own = TorchEvaluator.by_group, distributed.rank()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    seed, attempts = map(int, os.environ.get("KILLS", "0 0").split())
    rng = np.random.default_rng([seed, attempt])
    victim, batches, seconds = rng.integers(distributed.ranks()), rng.integers(4), rng.uniform(0, 0.02)
    dies = attempt < attempts and own == victim

    def die_soon() -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def counted(self: TorchEvaluator, rows: np.ndarray) -> np.ndarray:
        computed.append(len(rows))
        with (folder / f"rows{own}").open("a") as log:
            log.write(f"{len(rows)}\n")
        if dies and len(computed) == batches:
            die_soon()
        return by_group(self, rows)

    TorchEvaluator.by_group = counted
    model = trained()
    if dies and not batches:
        seconds *= 50  # while the evaluator is made, the ranks meet, the store opens
        die_soon()
    result = search(model, folder)
    return {"plan": result.plan.to_json(), "rows": sum(computed), "attempt": attempt}


def errors(folder: Path) -> dict:
    ev = evaluator(trained(), [samples(32, 1)], bits=(2, 8))
    shared = distributed.shared(ev)
    rows = np.zeros((6, len(ev.slots)), np.int8)
    found = {}

    def caught(name: str, work) -> None:
        try:
            work()
        except SmpqError as error:
            found[name] = str(error)

    def ill(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("this rank is ill")

    assert np.array_equal(shared(rows), ev(rows))
    if distributed.rank() == 1:
        ev.by_group = ill
    caught("failing", lambda: shared(rows))
    vars(ev).pop("by_group", None)
    caught("apart", lambda: shared(rows + np.int8(distributed.rank())))
    assert np.array_equal(shared(rows), ev(rows))  # and it goes on
    if distributed.rank() == 1:
        ev.fingerprint = "another"
    caught("other study", lambda: distributed.shared(ev))
    caught("store", lambda: distributed.kept(lambda: SqliteStore("/")))
    return found


if __name__ == "__main__":
    distributed.join("cpu")
    where = Path(sys.argv[2])
    told = {"search": whole, "errors": errors}[sys.argv[1]](where)
    (where / f"rank{distributed.rank()}.json").write_text(json.dumps(told))
    distributed.leave()
