"""Runs a captured model for n coalitions at once, every value once per distinct choice in the slots before it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten

from smpq_ext import _C
from smpq_ext.engine.capture import Graph, Value, fill, leaves
from smpq_ext.engine.integer import Call, Integer
from smpq_ext.engine.samples import take_rows

if TYPE_CHECKING:
    from smpq_ext.engine.executor import QuantizedLayer, RowNorm


@dataclass(frozen=True)
class _Rows:
    """The distinct rows of a place."""

    row: NDArray[np.int64]  # [n]: of each coalition
    coalition: NDArray[np.int64]  # [rows]: one that has the row


@dataclass(frozen=True)
class _Children:
    """The codes of a value that each of its readers takes."""

    readers: tuple[int, ...]  # steps
    row: list[Tensor]  # [children]: of the value
    grid: list[Tensor]  # [children, 4]


class Lockstep:
    """All coalitions advance together, step by step, [rows * samples, ...]; descendants index into their ancestors.

    Layers and norms are the objects of the executor that swaps modules, so both give the same values; `integer` runs
    assignments of at most 8 bits.
    """

    def __init__(
        self, graph: Graph, layers: list[QuantizedLayer], norms: Mapping[str, RowNorm], integer: Integer | None = None
    ) -> None:
        self.graph, self.layers, self.norms, self.integer = graph, layers, norms, integer
        self.rows: list[_Rows] = []
        self._descent: dict[tuple[int, int], Tensor | None] = {}
        self._calls: dict[int, Call] = {}  # of the fused steps, by the last one; empty for mixtures
        self._children: dict[int, _Children] = {}  # of the fused calls, by their step
        self._quantized: dict[int, _Children] = {}  # of floating values
        self._frees = graph.frees({k: step.operands for k, step in enumerate(graph.steps)})

    @property
    def integers(self) -> Container[int]:
        """The layers that run in integers where rows are assignments."""
        return () if self.integer is None else self.integer.layers

    def load(
        self, choices: Mapping[str, NDArray[np.int64]], assigned: Mapping[str, NDArray[np.int64]] | None = None
    ) -> None:
        """Plan the coalitions: the number of each one's choice, [n], in every quantized slot.

        assigned: the same as indices of candidates, where the rows are assignments.
        """
        self.unload()
        given = choices if assigned is None else assigned
        table = np.stack([given[name] for name in self.graph.columns], axis=1).astype(np.int32)
        self.rows = [_Rows(*found) for found in _C.plan(self.graph.places, table)]
        if assigned is None or self.integer is None:
            return
        picked = [
            torch.from_numpy(table[rows.coalition, columns[0]].astype(np.int64)) if columns else None
            for rows, (_, columns) in zip(self.rows, self.graph.places, strict=True)
        ]
        for last, fused in self.integer.fused.items():
            place = self._place(fused.step)
            codes = self._codes_place(fused.step)
            parent = self._row_of(codes, place)
            self._calls[last] = self.integer.call(fused, parent, picked[codes], picked[place])

        def children(source: int, readers: tuple[int, ...]) -> _Children:
            places = [self._codes_place(c) for c in readers]
            grids = [self.integer.by_step[c].layer.grids for c in readers]
            return _Children(
                readers,
                [self._row_of(self._place(source), place) for place in places],
                [g[picked[place]] for g, place in zip(grids, places, strict=True)],
            )

        self._children = {k: children(k, self.integer.epilogue[k]) for k in self.integer.fused}
        self._quantized = {k: children(k, readers) for k, readers in self.integer.quantized.items() if readers}

    def unload(self) -> None:
        self.rows, self._descent, self._calls, self._children, self._quantized = [], {}, {}, {}, {}

    def __call__(self, inputs: Any, samples: int) -> Any:
        """The outputs for the inputs of one row, [n * samples, ...], n coalitions being loaded."""
        graph = self.graph
        values: dict[int, Any] = {**graph.constants, **dict(enumerate(leaves(inputs)))}
        codes: dict[int, Tensor] = {}
        self._broken = torch.zeros(len(self.rows[0].row), samples, dtype=torch.bool)
        absorbed, frees = (
            (self.integer.absorbed, self.integer.frees) if self.integer and self._calls else ((), self._frees)
        )
        for k, step in enumerate(graph.steps):
            if k < graph.inputs or step.place is None or k in absorbed:
                continue
            count = len(self.rows[step.place].coalition)
            if k in self._calls:
                values[k] = self._integer(k, values, codes)
            elif step.layer is not None:
                values[k] = self._layer(step.layer, values[step.operands[0]], step.operands[0], step.place)
            else:
                read = {j: self._descend(values[j], graph.steps[j].place, step.place) for j in step.operands}
                args = fill(step.args, read, count * samples)
                if step.norm in self.norms:
                    values[k] = self.norms[step.norm].by_row(args[0], count)
                else:
                    values[k] = step.target(*args, **fill(step.kwargs, read, count * samples))
            for j in frees.get(k, ()):
                values.pop(j, None)
        everyone = [self._everyone(values[x.step], x.step) if isinstance(x, Value) else x for x in graph.outputs]
        return tree_unflatten([self._break(x) for x in everyone], graph.output_spec)

    def _integer(self, last: int, values: dict[int, Any], codes: dict[int, Tensor]) -> Tensor | None:
        """A fused call: its codes are put where the next layers find them; returns the floating value if it is read."""
        assert self.integer is not None
        fused, call = self.integer.fused[last], self._calls[last]
        if fused.step not in codes:
            self._quantize(fused.source, values[fused.source], codes)
        residual = residual_row = None
        if fused.residual is not None:
            self._look(fused.residual, values[fused.residual])
            residual_row = self._row_of(self._place(fused.residual), self._place(last))
            residual = _pixels(values[fused.residual], self._count(fused.residual), fused.layer.conv2d)
        wanted = last in self.integer.with_values
        out = torch.ops.smpq.coalition_convolution(
            codes.pop(fused.step),
            *(call.padding, fused.layer.packed, call.start, call.parent, call.variant, call.scale, call.bias),
            *(call.norm, call.eps, residual, residual_row, fused.low, fused.high),
            *(fused.geometry, fused.layer.depthwise, wanted),
            *(self._children[last].row, self._children[last].grid),
        )
        if fused.norm in self.norms:
            self.norms[fused.norm].record(*out[1][-1])
        codes.update(zip(self._children[last].readers, out[2:], strict=True))
        if not wanted:
            return None
        if fused.layer.conv2d:
            return out[0].flatten(0, 1).permute(0, 3, 1, 2)
        return out[0].view(-1, *self.graph.kinds[last][0][1:])

    def _quantize(self, source: int, value: Tensor, codes: dict[int, Tensor]) -> None:
        """The codes of a floating value for all layers that read it."""
        assert self.integer is not None
        self._look(source, value)
        children = self._quantized[source]
        for conv2d in (True, False):
            chosen = [i for i, c in enumerate(children.readers) if self.integer.by_step[c].layer.conv2d == conv2d]
            if chosen:
                x = _pixels(value, self._count(source), conv2d)
                rows, grids = [children.row[i] for i in chosen], [children.grid[i] for i in chosen]
                same = torch.arange(len(x))
                out = torch.ops.smpq.coalition_epilogue(
                    x, same, None, None, None, 0.0, None, None, -math.inf, math.inf, False, rows, grids
                )
                codes.update(zip([children.readers[i] for i in chosen], out[2:], strict=True))

    def _look(self, step: int, value: Tensor) -> None:
        """Remember where a floating value holds NaN, [n, samples]: no code says so."""
        if step not in self._calls and value.numel() and value.amax().isnan():
            rows = self.rows[self._place(step)]
            broken = value.unflatten(0, (len(rows.coalition), self._broken.shape[1], -1)).flatten(2).isnan().any(2)
            self._broken |= broken[self._index(rows.row)]

    def _break(self, value: Any) -> Any:
        """What is returned, [n * samples, ...], with NaN in those places."""
        if not self._broken.any() or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        rows = value.unflatten(0, (*self._broken.shape, -1)).clone()
        rows[self._broken] = math.nan
        return rows.flatten(0, 2)

    def _place(self, step: int) -> int:
        place = self.graph.steps[step].place
        assert place is not None
        return place

    def _codes_place(self, step: int) -> int:
        """Where the input of an integer layer has been quantized: before the choice of its weight."""
        return self.graph.places[self._place(step)][0][0]

    def _count(self, step: int) -> int:
        return len(self.rows[self._place(step)].coalition)

    def _row_of(self, source: int, place: int) -> Tensor:
        return self._index(self.rows[source].row[self.rows[place].coalition])

    def _index(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self.layers[0].source.device)

    def _layer(self, layer: int, x: Tensor, operand: int, place: int) -> Tensor:
        source = self.graph.steps[operand].place
        assert source is not None
        run, rows = self.layers[layer], self.rows[place]
        mixtures = variant = None
        if run.activation is not None:
            mixtures = run.mixtures[self._index(rows.coalition)]
        if run.weight is not None:
            variant = [run.variant[k] for k in rows.coalition]
        parent = self._parent(source, place)
        return run.by_row(x, len(self.rows[source].coalition), len(rows.coalition), parent, mixtures, variant)

    def _parent(self, source: int, place: int) -> Tensor | None:
        """The row of place `source` that each row of `place` descends from, [rows]; None where they are the same."""
        if source == place:
            return None
        if (source, place) not in self._descent:
            rows = self.rows[source].row[self.rows[place].coalition]
            same = np.array_equal(rows, np.arange(len(self.rows[source].coalition)))
            self._descent[source, place] = None if same else self._index(rows)
        return self._descent[source, place]

    def _descend(self, value: Any, source: int | None, place: int) -> Any:
        """A value of place `source` for the rows of `place`."""
        parent = None if source is None else self._parent(source, place)
        return value if parent is None else self._take(value, source, parent)

    def _everyone(self, value: Any, step: int) -> Any:
        """A value for every coalition, [n * samples, ...]."""
        source = self.graph.steps[step].place
        return value if source is None else self._take(value, source, self._index(self.rows[source].row))

    def _take(self, value: Any, source: int | None, index: Tensor) -> Any:
        assert source is not None
        count = len(self.rows[source].coalition)
        return tree_map(lambda x: take_rows(x, count, index) if isinstance(x, Tensor) else x, value)


def _pixels(x: Tensor, rows: int, conv2d: bool) -> Tensor:
    """A value [rows * samples, ...] as [rows, samples, height, width, channels]."""
    if conv2d:
        return x.permute(0, 2, 3, 1).contiguous().unflatten(0, (rows, -1))
    x = x.contiguous().unflatten(0, (rows, -1))
    return x[:, None, None] if x.dim() == 3 else x.flatten(2, -2)[:, :, None]
