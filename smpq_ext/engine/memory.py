"""The memory of a device: what is free, what a forward takes, and that what was freed is used again."""

from __future__ import annotations

import ctypes
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_owners: set[int] = set()  # the ids of what memory is kept for


class Meter(TorchDispatchMode):
    """Counts the bytes that tensors made inside it occupy at once, op by op (what kernels use inside is not seen)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), made=False)  # weights and data were there before
        result = func(*args, **(kwargs or {}))
        self._see(result, made=True)
        return result

    def _see(self, tree: Any, made: bool) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if made else 0
                if key not in self.seen:
                    self.seen.add(key)
                    weakref.finalize(storage, self._free, key, size)  # its address may be another's after it
                    self.live += size
                    self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def keep_freed(owner: object) -> None:
    """Let glibc keep what is freed on the CPU for its next use, as long as `owner` lives.

    By itself it gives large blocks back and faults them in again, operation by operation: up to 2.5 times the time of a
    forward (docs/performance.md). Where the C library is another one, nothing happens.
    """
    if _mallopt(0, -1):
        _owners.add(id(owner))
        weakref.finalize(owner, _give_back, id(owner)).atexit = False


def _give_back(owner: int) -> None:
    _owners.discard(owner)
    if not _owners:
        _mallopt(65536, 128 << 10)  # as glibc starts
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(mappings: int, trim_threshold: int) -> bool:
    """How many blocks may be mappings of their own, and how much freed memory is kept at the end of the heap."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(-4, mappings) and mallopt(-1, trim_threshold))
