"""Forwards of loaded rows as CUDA graphs: launched op by op once, recorded, and then replayed for other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Recorded:
    """One forward as a CUDA graph. The forward reads nothing back from the device, and makes nothing on the host."""

    def __init__(self, run: Callable[[Any], Any], inputs: Any, device: torch.device, pool: Any) -> None:
        self.inputs = _copy(inputs)
        self.graph = torch.cuda.CUDAGraph()
        here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(here)
        # Not torch.cuda.graph, which gives the memory that torch has cached back to the driver first.
        with torch.cuda.stream(stream):
            self.graph.capture_begin(pool=pool)
            try:
                self.outputs = run(self.inputs)
            finally:
                self.graph.capture_end()
        here.wait_stream(stream)

    def __call__(self, inputs: Any) -> Any:
        """The outputs for other inputs of the same shapes."""
        for mine, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
        self.graph.replay()
        return _copy(self.outputs)


class Replay:
    """Runs `run(inputs, samples)`; from the second call for a number of samples on, its record."""

    def __init__(self, run: Callable[[Any, int], Any], device: torch.device) -> None:
        self.run, self.device = run, device
        self._pool = torch.cuda.graph_pool_handle()  # one after the other, records use the same memory
        self._records: dict[int, Recorded | None] = {}

    def forget(self) -> None:
        """Other rows are loaded: records of these are worth nothing."""
        self._records.clear()

    def __call__(self, inputs: Any, samples: int) -> Any:
        if samples not in self._records:  # the first time libraries choose algorithms, and indices go to the device
            self._records[samples] = None
            return self.run(inputs, samples)
        record = self._records[samples]
        if record is None:
            record = self._records[samples] = Recorded(lambda x: self.run(x, samples), inputs, self.device, self._pool)
        return record(inputs)


def _copy(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)
