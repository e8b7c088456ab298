"""One search by several processes: every rank runs it, the rows of each batch are shared out, rank 0 keeps the store.

All ranks take the same decisions, for all of them see the same values; what one of them cannot do fails on all. What is
sent are bytes and numbers, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from smpq_ext.core import Assignments, Evaluator, Mixtures, SmpqError, Store, Values

SMOOTHING = 0.5  # weight of the last batch in the speed of a rank
HOPE = 0.02  # weight of twice the others' speed in that of a rank without rows
PATIENCE = 0.05  # seconds between two attempts to reach rank 0


def join(device: str) -> str:
    """Join the process group of a launch, as by torchrun; returns the device of this rank. Alone it does nothing.

    Raises SmpqError where there are more ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = device.startswith("cuda")
        if cuda:
            local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= count:
                raise SmpqError(f"device: this machine has {count} GPUs for rank {local}; start at most {count} here")
            device = f"cuda:{local}"
            torch.cuda.set_device(device)
        store, own, world = _store_of_this_attempt()
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=own, world_size=world)
    return device


def leave() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks() -> int:
    """How many processes search together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return dist.get_rank() if ranks() > 1 else 0


def shared(evaluator: Evaluator) -> Evaluator:
    """The evaluator, its rows computed by all ranks together."""
    return evaluator if ranks() == 1 else SharedEvaluator(evaluator)


def kept(make: Callable[[], Store]) -> Store:
    """The store that `make` opens, by rank 0 alone."""
    return make() if ranks() == 1 else SharedStore(make)


class SharedEvaluator:
    """An evaluator that computes a share of the rows of a request, by its speed so far, and gathers the others'.

    Raises SmpqError on all ranks where a rank fails, or was asked something else than the others.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.fingerprint = evaluator.fingerprint
        self.space = evaluator.space
        self.slots = evaluator.slots
        self.groups = evaluator.groups
        prints = _gather(self.fingerprint.encode())
        if len(set(prints)) > 1:
            other = next(r for r, p in enumerate(prints) if p != prints[0])
            raise SmpqError(
                f"distributed: rank {other} has another study than rank 0; model, data, loss, versions and the kind of "
                "processor must be the same on all ranks"
            )
        self.rows_per_batch = sum(int(n) for n in _gather(str(evaluator.rows_per_batch).encode()))
        self.rates = np.ones(ranks())  # in units of the mean of all

    def __call__(self, mixtures: Mixtures | Assignments) -> Values:
        """Mixtures [n, slots, candidates] or assignments [n, slots] to values [n]."""
        return np.asarray((self.by_group(mixtures) * self.groups).sum(axis=1), np.float64)

    def by_group(self, mixtures: Mixtures | Assignments) -> NDArray[np.float64]:
        """The same for each group of calibration samples, [n, groups]."""
        edges = shares(len(mixtures), self.rates)
        start, stop = edges[rank()], edges[rank() + 1]
        own, failure = np.empty((0, len(self.groups))), None
        begun = time.perf_counter()
        try:
            if stop > start:
                own = np.asarray(self.evaluator.by_group(mixtures[start:stop]), np.float64)
        except Exception as error:
            failure = error
        report = {
            "rate": len(own) / max(time.perf_counter() - begun, 1e-9),
            "asked": hashlib.sha256(np.ascontiguousarray(mixtures).tobytes()).hexdigest(),
            "failure": failure and (str(failure) if isinstance(failure, SmpqError) else repr(failure)),
        }
        pieces = _gather(json.dumps(report).encode() + b"\n" + own.astype("<f8").tobytes())
        told = [json.loads(piece.partition(b"\n")[0]) for piece in pieces]
        for r, report in enumerate(told):
            if report["failure"] is not None:
                raise SmpqError(f"rank {r}: {report['failure']}") from failure
            if report["asked"] != told[0]["asked"]:
                raise SmpqError(
                    f"distributed: rank {r} asks for other rows than rank 0; the same library versions and kind of "
                    "processor are needed on all ranks"
                )
        self.rates = learned(self.rates, np.array([report["rate"] for report in told]))
        values = b"".join(piece.partition(b"\n")[2] for piece in pieces)
        return np.frombuffer(values, "<f8").astype(np.float64).reshape(len(mixtures), len(self.groups))

    def derivatives(self, mixtures: Mixtures) -> NDArray[np.float64]:
        """Of the value by the shares of mixtures [n, slots, candidates], as rank 0 finds them."""

        def work() -> tuple[bytes, None]:
            return self.evaluator.derivatives(mixtures).astype("<f8").tobytes(), None

        return np.frombuffer(_by_first(work)[0], "<f8").astype(np.float64).reshape(mixtures.shape)

    def parts(self, most: int) -> tuple[tuple[float, SharedEvaluator], ...]:
        """At most so many, each on groups of samples of its own, with its share of the value."""
        parts = self.evaluator.parts(most)
        if len(set(_gather(str(len(parts)).encode()))) > 1:
            raise SmpqError("distributed: the ranks part the samples in other ways; is the model the same on all?")
        return ((1.0, self),) if len(parts) == 1 else tuple((share, SharedEvaluator(part)) for share, part in parts)


class SharedStore:
    """A store that rank 0 opens, reads and writes; the others are told what it knows. Its errors are raised on all."""

    def __init__(self, make: Callable[[], Store]) -> None:
        self._store: Store | None = _by_first(lambda: (b"", make()))[1]

    def read(self, study: str) -> dict[bytes, NDArray[np.float64]]:
        """All that is known of the study: key to values [groups]."""

        def work() -> tuple[bytes, None]:
            assert self._store is not None
            found = self._store.read(study)
            return json.dumps(
                [[key.hex(), groups.astype("<f8").tobytes().hex()] for key, groups in found.items()]
            ).encode(), None

        pairs = json.loads(_by_first(work)[0])
        return {bytes.fromhex(k): np.frombuffer(bytes.fromhex(v), "<f8").astype(np.float64) for k, v in pairs}

    def append(self, study: str, rows: Mapping[bytes, NDArray[np.float64]]) -> None:
        """Add rows, values [groups] by key, which all ranks have; a key that is known keeps its first values."""

        def work() -> tuple[bytes, None]:
            assert self._store is not None
            self._store.append(study, rows)
            return b"", None

        _by_first(work)

    def close(self) -> None:
        """Close the store of rank 0."""
        close = getattr(self._store, "close", None)
        if close is not None:
            close()


def _store_of_this_attempt() -> tuple[dist.Store, int, int]:
    """A store that rank 0 opens, rank and ranks.

    That of torchrun stays through restarts (torch 2.13: its prefix for each attempt is gone), and in it the addresses
    of processes that are dead, to which a rank that comes early would connect. Only rank 0's address is taken from it.
    """
    meeting, own, world = next(rendezvous("env://", timeout=dist.default_pg_timeout))
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + dist.default_pg_timeout.total_seconds()
    if own == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        meeting.set("smpq_ext", str(store.port))
        return store, own, world
    while True:
        port = int(meeting.get("smpq_ext"))
        try:
            socket.create_connection((host, port)).close()
            return dist.TCPStore(host, port, world, is_master=False), own, world
        except OSError:  # the address of a rank 0 that is no more
            if time.monotonic() > deadline:
                raise
            time.sleep(PATIENCE)


def learned(rates: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rates [ranks] after a batch, in units of their mean; `measured` in rows per second, 0 of a rank without rows.

    Such a rank is thought faster from batch to batch, so that it gets a row, and is measured, again.
    """
    had = measured > 0
    if not had.any():
        return rates
    mean = rates[had].mean()
    seen = (1 - SMOOTHING) * rates + SMOOTHING * measured * mean / measured[had].mean()
    new = np.where(had, seen, (1 - HOPE) * rates + HOPE * 2 * mean)
    return np.asarray(new / new.mean(), np.float64)


def shares(rows: int, rates: NDArray[np.float64]) -> list[int]:
    """Where each rank's run of `rows` begins, and the end, [ranks + 1]: as many as it computes in the time of all."""
    exact = rows * rates / rates.sum()
    counts = np.floor(exact).astype(int)
    first = np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]
    counts[first] += 1
    return [0, *np.cumsum(counts).tolist()]


def _by_first(work: Callable[[], tuple[bytes, Any]]) -> tuple[bytes, Any]:
    """What rank 0 gets from `work`: the bytes on all ranks, the other thing on rank 0. Its exception on all ranks."""
    told, thing, failure = b"", None, None
    if rank() == 0:
        try:
            data, thing = work()
            told = b"+" + data
        except Exception as error:
            failure, told = error, b"-" + str(error).encode()
    size = torch.tensor([len(told)], dtype=torch.int64, device=_device())
    dist.broadcast(size, 0)
    data_ = torch.frombuffer(bytearray(told or bytes(int(size))), dtype=torch.uint8).to(_device())
    dist.broadcast(data_, 0)
    told = data_.cpu().numpy().tobytes()
    if failure is not None:
        raise failure
    if told[:1] == b"-":
        raise SmpqError(told[1:].decode())
    return told[1:], thing


def _gather(data: bytes) -> list[bytes]:
    """The bytes of every rank."""
    size = torch.tensor([len(data)], dtype=torch.int64, device=_device())
    sizes = [torch.zeros_like(size) for _ in range(ranks())]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    longest = max(lengths)
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0") or b"\0"), dtype=torch.uint8).to(_device())
    pieces: list[Tensor] = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded)
    return [piece.cpu().numpy().tobytes()[:length] for piece, length in zip(pieces, lengths, strict=True)]


def _device() -> torch.device:
    """Where the backend wants what it sends."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
