"""Runs a captured model for n coalitions at once, every value once per distinct choice in the slots before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten

from smpq_ext import _C
from smpq_ext.engine.capture import Graph, Value, fill, leaves

if TYPE_CHECKING:
    from smpq_ext.engine.executor import QuantizedLayer, RowNorm


@dataclass(frozen=True)
class _Rows:
    """The distinct rows of a place."""

    row: NDArray[np.int64]  # [n]: of each coalition
    coalition: NDArray[np.int64]  # [rows]: one that has the row


def take_rows(x: Tensor, rows: int, index: Tensor) -> Tensor:
    """The rows [k] of x [rows * samples, ...] as [k * samples, ...], in the memory format of x."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return take_rows(x.permute(0, 2, 3, 1), rows, index).permute(0, 3, 1, 2)
    return x.unflatten(0, (rows, -1)).index_select(0, index).flatten(0, 1)


class Lockstep:
    """All coalitions advance together, step by step, [rows * samples, ...]; descendants index into their ancestors.

    Layers and norms are the objects of the executor that swaps modules, so both give the same values.
    """

    def __init__(self, graph: Graph, layers: list[QuantizedLayer], norms: Mapping[str, RowNorm]) -> None:
        self.graph, self.layers, self.norms = graph, layers, norms
        self.rows: list[_Rows] = []
        self._descent: dict[tuple[int, int], Tensor | None] = {}

    def load(self, choices: Mapping[str, NDArray[np.int64]]) -> None:
        """Plan the coalitions: the number of each one's choice, [n], in every quantized slot."""
        table = np.stack([choices[name] for name in self.graph.columns], axis=1).astype(np.int32)
        self.rows = [_Rows(*found) for found in _C.plan(self.graph.places, table)]
        self._descent = {}

    def unload(self) -> None:
        self.rows, self._descent = [], {}

    def __call__(self, inputs: Any, samples: int, renormalize: bool) -> Any:
        """The outputs for the inputs of one row, [n * samples, ...], n coalitions being loaded."""
        graph = self.graph
        values: dict[int, Any] = {**graph.constants, **dict(enumerate(leaves(inputs)))}
        for k, step in enumerate(graph.steps):
            if k < graph.inputs or step.place is None:
                continue
            count = len(self.rows[step.place].coalition)
            if step.layer is not None:
                values[k] = self._layer(step.layer, values[step.operands[0]], step.operands[0], step.place)
            else:
                read = {j: self._descend(values[j], graph.steps[j].place, step.place) for j in step.operands}
                args = fill(step.args, read, count * samples)
                if renormalize and step.norm in self.norms:
                    values[k] = self.norms[step.norm].by_row(args[0], count)
                else:
                    values[k] = step.target(*args, **fill(step.kwargs, read, count * samples))
            for j in step.frees:
                del values[j]
        everyone = [self._everyone(values[x.step], x.step) if isinstance(x, Value) else x for x in graph.outputs]
        return tree_unflatten(everyone, graph.output_spec)

    def _layer(self, layer: int, x: Tensor, operand: int, place: int) -> Tensor:
        source = self.graph.steps[operand].place
        assert source is not None
        run, rows = self.layers[layer], self.rows[place]
        mixtures = variant = None
        if run.activation is not None:
            mixtures = run.mixtures[torch.from_numpy(rows.coalition)]
        if run.weight is not None:
            variant = [run.variant[k] for k in rows.coalition]
        parent = self._parent(source, place)
        return run.by_row(x, len(self.rows[source].coalition), len(rows.coalition), parent, mixtures, variant)

    def _parent(self, source: int, place: int) -> Tensor | None:
        """The row of place `source` that each row of `place` descends from, [rows]; None where they are the same."""
        if source == place:
            return None
        if (source, place) not in self._descent:
            index = self.rows[source].row[self.rows[place].coalition]
            same = len(index) == len(self.rows[source].coalition) and bool((index == np.arange(len(index))).all())
            self._descent[source, place] = None if same else torch.from_numpy(index)
        return self._descent[source, place]

    def _descend(self, value: Any, source: int | None, place: int) -> Any:
        """A value of place `source` for the rows of `place`."""
        parent = None if source is None else self._parent(source, place)
        return value if parent is None else self._take(value, source, parent)

    def _everyone(self, value: Any, step: int) -> Any:
        """A value for every coalition, [n * samples, ...]."""
        source = self.graph.steps[step].place
        return value if source is None else self._take(value, source, torch.from_numpy(self.rows[source].row))

    def _take(self, value: Any, source: int | None, index: Tensor) -> Any:
        assert source is not None
        count = len(self.rows[source].coalition)
        return tree_map(lambda x: take_rows(x, count, index) if isinstance(x, Tensor) else x, value)
