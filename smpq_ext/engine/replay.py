"""Forwards of loaded rows as CUDA graphs: launched op by op once, recorded, and then replayed for other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Pool:
    """Memory that records use one after the other.

    torch gives a pool up with the last graph in it, so one of next to nothing stays; and what was freed is used again
    on the same stream only, so all are recorded on one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.anchor = self.record(lambda: torch.zeros(1, device=device))

    def record(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """What `run` launches as a graph, and its outputs, which the graph writes."""
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        # Not torch.cuda.graph, which gives the memory that torch has cached back to the driver first.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.handle)
            try:
                outputs = run()
            finally:
                graph.capture_end()
        here.wait_stream(self.stream)
        return graph, outputs


class Recorded:
    """One forward as a CUDA graph. The forward reads nothing back from the device, and makes nothing on the host."""

    def __init__(self, run: Callable[[Any], Any], inputs: Any, pool: Pool) -> None:
        self.inputs = _copy(inputs)
        self.graph, self.outputs = pool.record(lambda: run(self.inputs))

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
        self.run, self._pool = run, Pool(device)
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
            record = self._records[samples] = Recorded(lambda x: self.run(x, samples), inputs, self._pool)
        return record(inputs)


def _copy(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)
