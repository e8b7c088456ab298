"""Runs a model for n coalitions at once: the coalitions are folded into the batch dimension, [n * samples, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smpq_ext import ops
from smpq_ext.core import Space
from smpq_ext.engine.grids import Grids
from smpq_ext.engine.layers import Layer
from smpq_ext.engine.memory import keep_freed
from smpq_ext.engine.samples import Batch, call, is_channels_last, take_rows

if TYPE_CHECKING:
    from smpq_ext.engine.lockstep import Lockstep
    from smpq_ext.engine.replay import Replay

# From so many samples on, oneDNN's and MKL's products give a sample the same bits whatever the batch size (measured).
# Below it, each row is multiplied alone, so that its value does not depend on the rows beside it.
MERGE = 8


class Executor:
    """A copy of the model whose layers quantize for the rows that are `loaded`.

    `grids` [slot name] holds the quantized slots, searched or fixed; a layer without an entry stays float.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], space: Space, grids: Mapping[str, Grids], norms: tuple[str, ...]
    ) -> None:
        self.model, self.space, self.grids = model, space, grids
        self.device = layers[0].weight.device
        self.rows = 0  # 0: the float model
        self.statistics: dict[str, tuple[Tensor, Tensor]] | None = None  # filled by the norms while it is a dict
        self.channels_last = False
        self.lockstep: Lockstep | None = None  # runs the rows where the model could be captured
        self.replay: Replay | None = None  # and records of it, on CUDA
        self.choices: dict[str, NDArray[np.int64]] = {}  # [n], of every quantized slot: equal where mixtures are
        self.layers = [QuantizedLayer(self, layer, grids) for layer in layers]
        self.norms = {name: RowNorm(self, name, model.get_submodule(name)) for name in norms}
        keep_freed(self)

    @contextmanager
    def loaded(self, rows: NDArray[np.float32], assigned: bool = True) -> Iterator[None]:
        """With the rows, mixtures [n, slots, candidates], then the float model again, also after an exception.

        assigned: whether one-hot rows are run as assignments, on codes where the layers can.
        """
        mixtures = {name: np.ones((len(rows), 1), np.float32) for name in self.grids}
        for k, (slot, widths) in enumerate(zip(self.space.slots, self.space.candidates, strict=True)):
            mixtures[slot.name] = np.ascontiguousarray(rows[:, k, : len(widths)])
        chosen: dict[str, NDArray[np.int64]] | None = None
        if assigned and self.space.is_one_hot(rows).all():
            chosen = {name: np.zeros(len(rows), np.int64) for name in self.grids}
            chosen.update(zip((slot.name for slot in self.space.slots), rows.argmax(axis=2).T, strict=True))
        try:
            self._load(mixtures, chosen)
            yield
        finally:
            self._unload()

    def _load(
        self, mixtures: Mapping[str, NDArray[np.float32]], assigned: Mapping[str, NDArray[np.int64]] | None
    ) -> None:
        """Prepare the rows: mixtures [n, candidates] of every quantized slot. All weights are quantized in one call.

        assigned: where all mixtures are one-hot, the candidate's index [n] in every quantized slot.
        """
        self.rows = len(next(iter(mixtures.values())))
        distinct: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
        for name, rows in mixtures.items():
            different, index = np.unique(rows, axis=0, return_inverse=True)
            distinct[name] = different, index.reshape(-1)
        integer = self.lockstep.integers if self.lockstep is not None and assigned is not None else ()
        weighted = [(x, x.weight) for k, x in enumerate(self.layers) if x.weight is not None and k not in integer]
        grids = [g for _, g in weighted]
        floating = any(g.zero_point.is_floating_point() for g in grids)
        quantized = ops.coalition_fake_quantize_list(
            [layer.source for layer, _ in weighted],
            [g.scale for g in grids],
            [g.zero_point.to(g.scale.dtype) for g in grids] if floating else [],
            [g.quant_min for g in grids],
            [g.quant_max for g in grids],
            [torch.from_numpy(distinct[f"{layer.name}.weight"][0]).to(self.device) for layer, _ in weighted],
            axis=0,
        )
        for (layer, _), variants in zip(weighted, quantized, strict=True):
            layer.variants = variants.movedim(1, layer.axis + 1)
            layer.variant = distinct[f"{layer.name}.weight"][1].tolist()
        for layer in self.layers:
            if layer.activation is not None:
                layer.mixtures = torch.from_numpy(mixtures[f"{layer.name}.activation"]).to(self.device)
        self.choices = {name: index for name, (_, index) in distinct.items()}
        if self.lockstep is not None:
            self.lockstep.load(self.choices, assigned)
        if self.replay is not None:
            self.replay.forget()

    def _unload(self) -> None:
        self.rows = 0
        for layer in self.layers:
            layer.variants = layer.mixtures = torch.empty(0)
        if self.lockstep is not None:
            self.lockstep.unload()
        if self.replay is not None:
            self.replay.forget()

    def forward(self, batch: Batch, start: int, stop: int, model: nn.Module | None = None) -> Any:
        """The outputs for samples [start, stop) of the batch, [rows * samples, ...]; one row where nothing is loaded.

        `model`: another model to run in place of the copy, or the copy itself, which then swaps modules.
        """
        lockstep = self.lockstep if self.rows and model is None else None
        inputs = batch.rows(1 if lockstep else max(self.rows, 1), start, stop)
        if self.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if lockstep is not None:
            # A record would not keep the statistics.
            run = lockstep if self.replay is None or self.statistics is not None else self.replay
            return run(inputs, stop - start)
        return call(model or self.model, inputs)

    def first_non_finite(self, batch: Batch, start: int, stop: int) -> str | None:
        """The first module, in execution order, whose output holds NaN or infinity for the loaded rows."""
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
                if not found and not all(torch.isfinite(x).all() for x in tensors):
                    found.append(name or "(the model itself)")

            return hook

        handles = [m.register_forward_hook(look(name)) for name, m in self.model.named_modules()]
        try:
            self.forward(batch, start, stop, self.model)
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None


class QuantizedLayer:
    """Takes the place of a layer's forward in the copy."""

    def __init__(self, executor: Executor, layer: Layer, grids: Mapping[str, Grids]) -> None:
        self.executor, self.name, self.axis = executor, layer.name, layer.axis
        self.module: Any = layer.module
        self.weight, self.activation = grids.get(f"{layer.name}.weight"), grids.get(f"{layer.name}.activation")
        self.source = layer.weight.movedim(layer.axis, 0)
        self.variants = torch.empty(0)  # [variants, *weight.shape]
        self.variant: list[int] = []  # the variant of each row
        self.mixtures = torch.empty(0)  # [n, candidates]
        module = layer.module
        kind = None if "forward" in vars(module) else type(module).forward
        self.bias = torch.zeros(len(self.source), dtype=torch.float64, device=self.source.device)
        if getattr(module, "bias", None) is not None:
            self.bias = module.bias.detach().double()  # type: ignore[union-attr, operator]
        self.linear = kind is nn.Linear.forward
        self.conv2d = kind is nn.Conv2d.forward and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
        self.original = module.forward
        module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n = self.executor.rows
        if n == 0:
            return self.original(x, *args, **kwargs)
        variant = self.variant if self.weight is not None else None
        mixtures = self.mixtures if self.activation is not None else None
        return self.by_row(x, n, n, None, mixtures, variant, args, kwargs)

    def by_row(
        self,
        x: Tensor,
        parents: int,
        n: int,
        parent: Tensor | None,
        mixtures: Tensor | None,
        variant: list[int] | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The layer for n rows that descend from rows `parent` of x [parents * samples, ...]; None: from their own.

        mixtures: of the input's widths, [n, candidates], or None where it stays float; variant: of the weight, n
        indices, equal ones together, or None where it is not quantized. Returns [n * samples, ...].
        """
        kwargs = kwargs or {}
        rows = x.unflatten(0, (parents, -1)) if parents > 1 else x.unsqueeze(0)
        in_place = self.linear and not x.is_cuda and rows[0].numel() >= MERGE * rows.shape[-1]
        if mixtures is not None:
            g = self.activation
            if parent is None:
                parent = torch.arange(n, device=x.device)
            rows = ops.coalition_fake_quantize(
                rows, g.scale, g.zero_point, g.quant_min, g.quant_max, mixtures, parent=parent
            )
        elif parent is not None and variant is not None and in_place:
            # Nothing is gathered, and nothing put together: a row is multiplied where its parent stands.
            out = rows.new_empty(n, *rows.shape[1:-1], self.variants.shape[1])
            for y, p, v in zip(out, parent.tolist(), variant, strict=True):
                torch.mm(rows[p].flatten(0, -2), self.variants[v].t(), out=y.view(-1, y.shape[-1]))
            if self.module.bias is not None:
                out += self.module.bias
            return out.flatten(0, 1)
        elif parent is not None:
            rows = take_rows(x, parents, parent).unflatten(0, (n, -1))
        m = self.module
        products = rows[0].numel() // rows.shape[-1] if self.linear else len(rows[0])
        own = not (self.linear or (self.conv2d and rows.dim() == 5))
        if variant is None and (n == 1 or products >= MERGE):
            return self.original(rows.flatten(0, 1) if n > 1 else rows[0], *args, **kwargs)
        if own or (n > 1 and products < MERGE):
            return self._each(rows, variant, args, kwargs)
        assert variant is not None
        if self.linear:
            out = ops.coalition_linear(rows, self.variants, m.bias, variant)
            return out.flatten(0, 1) if n > 1 else out[0]
        geometry = m.stride, m.padding, m.dilation, m.groups
        out = ops.coalition_conv2d(rows, self.variants, m.bias, variant, *geometry).flatten(0, 1)
        if n > 1 and is_channels_last(rows[0]):
            # Rows put together may lose the format, and what follows would round differently in another one.
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    def _each(self, rows: Tensor, variant: list[int] | None, args: Any, kwargs: Any) -> Tensor:
        """The layer's own forward, row by row with the row's weight: [n * samples, ...]."""
        parameters = self.module._parameters
        own = parameters["weight"]
        try:
            out = []
            for k, row in enumerate(rows):
                if variant is not None:
                    parameters["weight"] = self.variants[variant[k]]
                out.append(self.original(row, *args, **kwargs))
        finally:
            parameters["weight"] = own
        return out[0] if len(out) == 1 else torch.cat(out)


class RowNorm:
    """Takes the place of a BatchNorm's forward in the copy: each row has statistics of its own."""

    def __init__(self, executor: Executor, name: str, module: nn.Module) -> None:
        self.executor, self.name, self.original = executor, name, module.forward
        self.module: Any = module
        self.plain = type(module).forward in (nn.BatchNorm1d.forward, nn.SyncBatchNorm.forward)
        module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, x: Tensor) -> Tensor:
        n = self.executor.rows
        if n == 0:
            return self.original(x)
        if self.plain:
            return self.by_row(x, n)
        # A forward of its own, that may do more: it runs as in training, with buffers that nobody else has.
        m, buffers = self.module, dict(self.module._buffers)
        try:
            m.training = True
            m._buffers.update({name: b.clone() for name, b in buffers.items() if b is not None})
            out = [self.original(row) for row in x.chunk(n)]
        finally:
            m.training = False
            m._buffers.update(buffers)
        if self.executor.statistics is not None:
            self.by_row(x, n)
        return torch.cat(out) if n > 1 else out[0]

    def by_row(self, x: Tensor, n: int) -> Tensor:
        """Each of n rows normalized by its own statistics, [n * samples, ...]."""
        m = self.module
        if x.dim() == 4 and not x.is_cuda and x.dtype == torch.float32 and is_channels_last(x):
            # torch adds in float32 where channels are last, and errs by up to 1e-3 of a variance.
            y, statistics, _ = torch.ops.smpq.coalition_epilogue(
                *(x.permute(0, 2, 3, 1).unflatten(0, (n, -1)), torch.arange(n), None, None, affine(m, x.device), m.eps),
                *(None, None, False, -math.inf, math.inf, 0, True, False, [], [], []),
            )
            self.record(*statistics[-1])
            return y.flatten(0, 1).permute(0, 3, 1, 2)
        out = []
        for row in x.chunk(n):
            y, mean, inverse = torch.native_batch_norm(row, m.weight, m.bias, None, None, True, 0.0, m.eps)
            out.append(y)
            self.record(mean, (inverse.double() ** -2 - m.eps).clamp(min=0).float())
        return torch.cat(out) if len(out) > 1 else out[0]

    def record(self, mean: Tensor, variance: Tensor) -> None:
        """Keep what a row was normalized by: with the biased variance an applied model gives the searched value."""
        if self.executor.statistics is not None:
            self.executor.statistics[self.name] = mean, variance


def affine(norm: Any, device: torch.device) -> Tensor:
    """Weight and bias of a BatchNorm, float64 [2, channels]."""
    like = torch.ones(norm.num_features, dtype=torch.float64, device=device)
    plain = like, torch.zeros_like(like)
    given = (x if x is None else x.detach().double() for x in (norm.weight, norm.bias))
    return torch.stack([y if x is None else x for x, y in zip(given, plain, strict=True)])
