"""Runs a captured model for n coalitions at once, every value once per distinct choice in the slots before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map, tree_unflatten

from smpq_ext import _C
from smpq_ext.engine.attention import Attention
from smpq_ext.engine.capture import Graph, Value, fill, leaves
from smpq_ext.engine.fusion import Call, Fused, Fusion
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
    """What each reader of a value takes of it."""

    readers: tuple[int, ...]  # steps
    row: list[Tensor]  # [children]: of the value
    grid: list[Tensor]  # [children, 4] or [children, candidates, 5]
    bits: list[int]  # of an element


class Lockstep:
    """All coalitions advance together, step by step, [rows * samples, ...]; descendants index into their ancestors.

    Layers and norms are the objects of the executor that swaps modules, so both give the same values. `integer` runs
    assignments, and `floating` mixtures, in fused calls; None: layer by layer. `attentions`: by their step, those that
    gather nothing. Without these three, values are those of the swapped modules but for the order of additions.
    """

    def __init__(self, graph: Graph, layers: list[QuantizedLayer], norms: Mapping[str, RowNorm]) -> None:
        self.graph, self.layers, self.norms = graph, layers, norms
        self._device = layers[0].source.device
        self.asks = self._device.type == "cpu"  # whether the host looks at values: elsewhere to ask is to wait
        self.integer: Fusion | None = None
        self.floating: Fusion | None = None
        self.attentions: Mapping[int, Attention] = {}
        self.rows: list[_Rows] = []
        self._found: dict[tuple[int | None, int | None], Tensor] = {}  # what `_row_of` and `_coalition` gave
        self._descent: dict[tuple[int, int], Tensor | None] = {}
        self._fusion: Fusion | None = None  # of the rows that are loaded
        self._codes = False  # whether some of its inputs are codes or fixed point, where NaN is lost
        self._calls: dict[int, Call] = {}  # of the fused steps, by the last one
        self._children: dict[int, _Children] = {}  # of the fused calls, by their step
        self._quantized: dict[int, _Children] = {}  # of floating values
        self._attended: dict[int, tuple[Tensor, ...]] = {}  # the rows of the operands of `attentions`
        self._frees = graph.frees({k: step.operands for k, step in enumerate(graph.steps)})

    @property
    def integers(self) -> frozenset[int]:
        """The layers that run on codes where rows are assignments."""
        if self.integer is None:
            return frozenset()
        return frozenset(k for k, layer in self.integer.layers.items() if layer.bits == 8)

    def paths(self) -> list[tuple[int, int]]:
        """The layers that fused calls run, and the bits of their inputs: for assignments, then for mixtures."""
        fusions = [f for f in (self.integer, self.floating) if f is not None]
        return [(k, layer.bits) for f in fusions for k, layer in f.layers.items()]

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
        self._attended = {
            i: tuple(self._row_of(self._place(k), self._place(i)) for k in found.operands)
            for i, found in self.attentions.items()
        }
        fusion = self._fusion = self.floating if assigned is None or self.integer is None else self.integer
        if fusion is None:
            return
        self._codes = any(layer.bits < 32 for layer in fusion.layers.values())
        for layer in fusion.layers.values():
            layer.load(assigned)
        for last, fused in fusion.fused.items():
            source, place = self._input_place(fused), self._place(last)
            parents, coalitions = (self._coalition(p) for p in (source, place))
            self._calls[last] = fusion.call(fused, parents, self._row_of(source, place), coalitions)

        def children(source: int, readers: tuple[int, ...]) -> _Children:
            fused = [fusion.by_step[k] for k in readers]
            places = [self._input_place(f) for f in fused]
            rows = [self._row_of(self._place(source), place) for place in places]
            coalitions = [self._coalition(place) for place in places]
            grids = [f.layer.grids(c) for f, c in zip(fused, coalitions, strict=True)]
            return _Children(readers, rows, grids, [f.layer.bits for f in fused])

        self._children = {k: children(k, fusion.epilogue[k]) for k in fusion.fused}
        self._quantized = {k: children(k, readers) for k, readers in fusion.quantized.items() if readers}

    def unload(self) -> None:
        if self._fusion is not None:
            for layer in self._fusion.layers.values():
                layer.unload()
        self._fusion, self._codes, self.rows, self._found = None, False, [], {}
        self._descent, self._attended, self._calls, self._children, self._quantized = {}, {}, {}, {}, {}

    def __call__(self, inputs: Any, samples: int) -> Any:
        """The outputs for the inputs of one row, [n * samples, ...], n coalitions being loaded."""
        graph = self.graph
        values: dict[int, Any] = {**graph.constants, **dict(enumerate(leaves(inputs)))}
        taken: dict[int, Tensor] = {}  # the inputs of fused calls, by the layer's step
        self._broken = torch.zeros(len(self.rows[0].row), samples, dtype=torch.bool, device=self._device)
        absorbed, frees = (self._fusion.absorbed, self._fusion.frees) if self._fusion else ((), self._frees)
        for k, step in enumerate(graph.steps):
            if k < graph.inputs or step.place is None or k in absorbed:
                continue
            count = len(self.rows[step.place].coalition)
            if k in self._calls:
                values[k] = self._fused(k, values, taken)
            elif k in self.attentions:
                q = self.attentions[k].operands[0]
                values[k] = self.attentions[k](values, self._attended[k], len(values[q]) // self._count(q))
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
        return tree_unflatten(everyone, graph.output_spec)

    def _fused(self, last: int, values: dict[int, Any], taken: dict[int, Tensor]) -> Tensor | None:
        """A fused call: what the next layers take is put where they find it; returns the value if it is read."""
        assert self._fusion is not None
        fused, call = self._fusion.fused[last], self._calls[last]
        if fused.layer.layer.activation is None:
            x = _pixels(values[fused.source], self._count(fused.source), fused.conv2d)
        else:
            if fused.step not in taken:
                self._quantize(fused.source, values[fused.source], taken)
            x = taken.pop(fused.step)
        residual = residual_row = None
        if fused.residual is not None:
            self._look(fused.residual, values[fused.residual])
            residual_row = self._row_of(self._place(fused.residual), self._place(last))
            residual = _pixels(values[fused.residual], self._count(fused.residual), fused.conv2d)
        wanted, product, children = last in self._fusion.with_values, call.product, self._children[last]
        out = torch.ops.smpq.coalition_convolution(
            *(x, product.padding, product.weight, product.start, call.parent, product.variant, call.scale, call.bias),
            *(call.norm, call.eps, residual, residual_row, fused.multiplies, fused.low, fused.high, fused.activation),
            *(fused.geometry, fused.layer.depthwise, wanted),
            *(children.row, children.grid, children.bits),
        )
        if fused.norm in self.norms:
            self.norms[fused.norm].record(*out[1][-1])
        taken.update(zip(children.readers, out[2:], strict=True))
        if not wanted:
            return None
        if fused.conv2d:
            return out[0].flatten(0, 1).permute(0, 3, 1, 2)
        return out[0].view(-1, *self.graph.kinds[last][0][1:])

    def _quantize(self, source: int, value: Tensor, taken: dict[int, Tensor]) -> None:
        """What all layers that read a floating value take of it."""
        assert self._fusion is not None
        look = self._codes and source not in self._calls and value.dim() > 2
        if not look:
            self._look(source, value)
        children = self._quantized[source]
        for conv2d in (True, False):
            chosen = [i for i, k in enumerate(children.readers) if self._fusion.by_step[k].conv2d == conv2d]
            if chosen:
                x = _pixels(value, self._count(source), conv2d)
                taking = ([field[i] for i in chosen] for field in (children.row, children.grid, children.bits))
                every = torch.arange(len(x), device=x.device)
                settings = None, None, None, 0.0, None, None, False, -math.inf, math.inf, 0, False, look
                _, _, broken, *inputs = torch.ops.smpq.coalition_epilogue(x, every, *settings, *taking)
                taken.update(zip([children.readers[i] for i in chosen], inputs, strict=True))
                if look and not (self.asks and not broken.any()):
                    self._remember(source, broken.unflatten(1, (self._broken.shape[1], -1)).any(2))

    def _look(self, step: int, value: Tensor) -> None:
        """Remember where a floating value holds NaN, [n, samples]: no code says so."""
        watched = self._codes and step not in self._calls and value.numel()
        if watched and not (self.asks and not value.amax().isnan()):
            rows = value.unflatten(0, (self._count(step), self._broken.shape[1], -1))
            self._remember(step, rows.flatten(2).isnan().any(2))

    def _remember(self, step: int, broken: Tensor) -> None:
        self._broken |= broken[self._row_of(self._place(step))]

    def _break(self, value: Tensor) -> Tensor:
        """What is returned, [n * samples, ...], with NaN in those places."""
        if not self._codes or not value.is_floating_point() or (self.asks and not self._broken.any()):
            return value
        rows = value.unflatten(0, (*self._broken.shape, -1))
        broken = self._broken.view(*self._broken.shape, *[1] * (rows.dim() - 2))
        return rows.masked_fill(broken, math.nan).flatten(0, 2)

    def _place(self, step: int) -> int:
        place = self.graph.steps[step].place
        assert place is not None
        return place

    def _input_place(self, fused: Fused) -> int:
        """Where the input of a fused layer is quantized: before the choice of its weight."""
        place = self._place(fused.step)
        return place if fused.layer.layer.weight is None else self.graph.places[place][0][0]

    def _count(self, step: int) -> int:
        return len(self.rows[self._place(step)].coalition)

    def _row_of(self, source: int, place: int | None = None) -> Tensor:
        """The row of place `source` that each row of `place`, or each coalition, has: on the device, looked up once."""
        if (source, place) not in self._found:
            row = self.rows[source].row
            self._found[source, place] = self._index(row if place is None else row[self.rows[place].coalition])
        return self._found[source, place]

    def _coalition(self, place: int) -> Tensor:
        """One coalition that has each row of `place`."""
        if (None, place) not in self._found:
            self._found[None, place] = self._index(self.rows[place].coalition)
        return self._found[None, place]

    def _index(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(self._device)

    def _layer(self, layer: int, x: Tensor, operand: int, place: int) -> Tensor:
        source = self.graph.steps[operand].place
        assert source is not None
        run, rows = self.layers[layer], self.rows[place]
        mixtures = variant = None
        if run.activation is not None:
            mixtures = run.mixtures[self._coalition(place)]
        if run.weight is not None:
            variant = [run.variant[k] for k in rows.coalition]
        parent = self._parent(source, place)
        return run.by_row(x, len(self.rows[source].coalition), len(rows.coalition), parent, mixtures, variant)

    def _parent(self, source: int, place: int | None) -> Tensor | None:
        """`_row_of`, or None where the rows are the same."""
        if source == place:
            return None
        if (source, place) not in self._descent:
            row = self.rows[source].row
            rows = row if place is None else row[self.rows[place].coalition]
            same = np.array_equal(rows, np.arange(len(self.rows[source].coalition)))
            self._descent[source, place] = None if same else self._row_of(source, place)
        return self._descent[source, place]

    def _descend(self, value: Any, source: int | None, place: int | None) -> Any:
        """A value of place `source` for the rows of `place`, or for every coalition."""
        parent = None if source is None else self._parent(source, place)
        return value if parent is None else self._take(value, source, parent)

    def _everyone(self, value: Any, step: int) -> Any:
        """A value for every coalition, [n * samples, ...]."""
        source = self.graph.steps[step].place
        taken = self._descend(value, source, None)
        return self._break(taken) if isinstance(taken, Tensor) and source is not None else taken

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
