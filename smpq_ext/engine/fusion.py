"""Which layers run with what follows them in one call, and who takes what from whom."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from smpq_ext.engine.capture import Graph, Step, aten
from smpq_ext.engine.executor import QuantizedLayer, affine

LANES = 16  # output channels that the kernel computes together
JOINS = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class Product:
    """What one layer multiplies for n rows, whatever the samples: arguments of torch.ops.smpq.coalition_convolution."""

    padding: Tensor  # [parents]: what stands for 0
    weight: Tensor  # [variants, ...], packed
    start: Tensor  # [rows, channels up to a multiple of 16]
    variant: Tensor  # [rows]
    scale: Tensor  # [rows, channels], float64
    bias: Tensor  # [channels], float64


class FusedLayer(Protocol):
    """A layer whose input and weights are ready for the kernel: codes, floats, or fixed point."""

    bits: int  # of an element of the input: 8, 16 or 32
    layer: QuantizedLayer
    depthwise: bool

    def load(self, assigned: Mapping[str, NDArray[np.int64]] | None) -> None:
        """Prepare for the rows that the executor has loaded."""

    def unload(self) -> None:
        """Forget them."""

    def grids(self, coalitions: Tensor) -> Tensor:
        """What the kernel takes to quantize the inputs of these coalitions, `child_grid` of the op."""

    def product(self, parents: Tensor, parent: Tensor, coalitions: Tensor) -> Product:
        """For rows of these coalitions [n], from inputs `parent` [n], which are of coalitions `parents`."""


@dataclass(frozen=True)
class Fused:
    """A layer with what follows it, in one call: normalization, a sum, a clamp, and the inputs of the next layers."""

    step: int  # of the layer; it runs for the rows of the last step, which may be more
    layer: FusedLayer
    source: int  # the step that it reads
    norm: str | None
    geometry: tuple[int, ...]  # kernel, stride, padding before and after, dilation
    residual: int | None
    multiplies: bool  # the residual is a factor
    low: float
    high: float
    activation: int  # of reference.ACTIVATIONS

    @property
    def conv2d(self) -> bool:
        return self.layer.layer.conv2d


@dataclass(frozen=True)
class Call:
    """What one call takes for the coalitions that are loaded, whatever the samples."""

    product: Product
    parent: Tensor  # [rows]
    scale: Tensor  # [rows, channels]
    bias: Tensor  # [rows, channels]
    norm: Tensor | None  # weight and bias of a normalization by each row's own statistics, [2, channels]
    eps: float


class Fusion:
    """The fused calls of a graph by their last step, and the readers of inputs by what they read."""

    def __init__(
        self,
        graph: Graph,
        layers: Mapping[int, FusedLayer],
        norms: Mapping[str, _BatchNorm],
        renormalized: Container[str],
    ) -> None:
        self.graph, self.layers, self.norms, self.renormalized = graph, layers, norms, renormalized
        self._readers = _readers({i: step.operands for i, step in enumerate(graph.steps)})
        outputs = graph.returned
        self.fused: dict[int, Fused] = {}
        self.absorbed: set[int] = set()  # steps inside of fused calls
        for i, step in enumerate(graph.steps):
            if step.layer in layers:
                self._fuse(i, layers[step.layer], outputs)
        self.by_step = {f.step: f for f in self.fused.values()}
        # Who takes a value quantized: `epilogue` are the layers of the same layout, whose inputs a fused call writes,
        # `quantized` those that get them from the floating value. A layer whose input stays float reads that.
        self.epilogue: dict[int, tuple[int, ...]] = {}
        self.quantized: dict[int, tuple[int, ...]] = {}
        self.with_values = set()  # the fused calls whose floating value is read
        reads = {k: step.operands for k, step in enumerate(graph.steps) if k not in self.absorbed}
        for last, f in self.fused.items():
            reads[last] = (f.source,) if f.residual is None else (f.source, f.residual)
        self.frees = graph.frees(reads)
        for k, found in _readers(reads).items():
            readers = [f for i in found if (f := self.fused.get(i)) is not None and f.source == k]
            takers = [f for f in readers if f.layer.layer.activation is not None]
            own = self.fused.get(k)
            alike = [f.step for f in takers if own is not None and f.conv2d == own.conv2d]
            self.epilogue[k] = tuple(alike)
            self.quantized[k] = tuple(f.step for f in takers if f.step not in alike)
            floating = any(i not in self.fused or self.fused[i].residual == k for i in found)
            if k in outputs or floating or self.quantized[k] or len(takers) < len(readers):
                self.with_values.add(k)

    def _fuse(self, i: int, layer: FusedLayer, outputs: set[int]) -> None:
        steps = self.graph.steps
        last, norm, residual, multiplies, low, high, activation = i, None, None, False, -math.inf, math.inf, 0
        members = [i]
        while last not in outputs and len(self._readers[last]) == 1:
            follower = self._readers[last][0]
            if follower in self.absorbed or follower in self.fused:
                break  # the sum with an earlier layer, which reads this one's value
            step = steps[follower]
            clamp = _clamp(step)
            if step.norm in self.norms and members == [i]:
                norm = step.norm
            elif step.target in JOINS and not step.kwargs and residual is None and len(step.operands) == 2:
                other = next(k for k in step.operands if k != last)
                if steps[other].place is None or self.graph.kinds[other] != self.graph.kinds[last]:
                    break
                residual, multiplies = other, step.target is aten.mul.Tensor
            elif clamp is not None or (activation := _activation(step)):
                low, high = clamp or (low, high)
                last = follower
                members.append(follower)
                break
            else:
                break
            last = follower
            members.append(follower)
        source, geometry = self._geometry(i, layer.layer)
        self.fused[last] = Fused(i, layer, source, norm, geometry, residual, multiplies, low, high, activation)
        self.absorbed.update(members[:-1])

    def _geometry(self, i: int, layer: QuantizedLayer) -> tuple[int, tuple[int, ...]]:
        """The step that a layer reads, zeros around planes left out, and its geometry with them."""
        source, m = self.graph.steps[i].operands[0], layer.module
        if not layer.conv2d:
            return source, (1, 1, 1, 1, 0, 0, 0, 0, 1, 1)
        top, left, bottom, right = (*m.padding, *m.padding)
        if (zeros := self._zeros(source)) is not None:
            self.absorbed.add(source)
            source = self.graph.steps[source].operands[0]
            top, left, bottom, right = (a + b for a, b in zip((top, left, bottom, right), zeros, strict=True))
        return source, (*m.kernel_size, *m.stride, top, left, bottom, right, *m.dilation)

    def _zeros(self, step: int) -> tuple[int, ...] | None:
        """The rows and columns of zeros (top, left, bottom, right) that a step puts around planes, for one reader."""
        target, args = self.graph.steps[step].target, self.graph.steps[step].args
        if target is aten.pad.default:
            constant = args[2:] in ((), ("constant",), ("constant", None), ("constant", 0.0))
        else:
            constant = target is aten.constant_pad_nd.default and args[2:] in ((), (0,))
        if not constant or len(args[1]) != 4 or min(args[1]) < 0:
            return None
        if len(self._readers[step]) > 1 or step in self.graph.returned:
            return None
        left, right, top, bottom = args[1]
        return top, left, bottom, right

    def call(self, fused: Fused, parents: Tensor, parent: Tensor, coalitions: Tensor) -> Call:
        """The tensors of a call for rows of these coalitions: see FusedLayer.product."""
        product = fused.layer.product(parents, parent, coalitions)
        scale, bias = product.scale, product.bias
        norm, eps = None, 0.0
        if fused.norm is not None:
            m = self.norms[fused.norm]
            norm, eps = affine(m, scale.device), m.eps
            if fused.norm not in self.renormalized:
                assert m.running_mean is not None and m.running_var is not None
                factor = norm[0] * (m.running_var.double() + eps).rsqrt()
                scale, bias = scale * factor, (bias - m.running_mean.double()) * factor + norm[1]
                norm = None
        bias = bias.float().expand_as(scale).contiguous()
        return Call(product, parent, scale.float().contiguous(), bias, norm, eps)


def pack(kernels: Tensor, groups: int, together: int) -> Tensor:
    """[variants, out, in / groups, kh, kw] as the kernel reads it, zeros where none is.

    Returns [variants, blocks of 16 out, taps, in of a group / together, 16, together], groups being put together until
    they fill blocks, or, where depthwise, [variants, blocks of 16 channels, taps, 16].
    """
    variants, outs, channels = kernels.shape[:3]
    if is_depthwise(kernels[0], groups):
        padded = torch.nn.functional.pad(kernels.flatten(2), (0, 0, 0, -outs % LANES))
        return padded.view(variants, -1, LANES, padded.shape[2]).transpose(2, 3).contiguous()
    if groups > 1:
        fills = (m for m in range(1, groups) if groups % m == 0 and m * outs // groups % LANES == 0)
        joined = next((m for m in fills if m * channels % 4 == 0), groups)
        apart = kernels.unflatten(1, (groups // joined, joined, -1))
        alone = torch.eye(joined, dtype=kernels.dtype, device=kernels.device)[:, None, :, None, None, None]
        kernels = (apart[:, :, :, :, None] * alone).flatten(4, 5).flatten(1, 3)
        channels *= joined
    beyond = -channels % (4 if together > 1 else 1)  # codes and fixed point come in fours of channels
    padded = torch.nn.functional.pad(kernels, (0, 0, 0, 0, 0, beyond, 0, -outs % LANES))
    groups = padded.shape[2] // together
    blocks = padded.reshape(variants, -1, LANES, groups, together, kernels.shape[3] * kernels.shape[4])
    return blocks.permute(0, 1, 5, 3, 2, 4).contiguous()


def is_depthwise(kernel: Tensor, groups: int) -> bool:
    """Whether every channel of a convolution with the weight [out, in / groups, ...] has one of its own."""
    return groups > 1 and groups == len(kernel) and kernel.shape[1] == 1


def _readers(reads: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """The steps that read each step, where step i reads `reads[i]`."""
    found: dict[int, list[int]] = {k: [] for k in reads}
    for i, operands in reads.items():
        for k in dict.fromkeys(operands):
            found[k].append(i)
    return found


def _clamp(step: Step) -> tuple[float, float] | None:
    """The bounds of a step that only clamps its operand."""
    if step.kwargs:
        return None
    if step.target is aten.relu.default:
        return 0.0, math.inf
    if step.target in (aten.hardtanh.default, aten.clamp.default):
        low, high = (*step.args[1:], *((-1.0, 1.0) if step.target is aten.hardtanh.default else (None, None)))[:2]
        return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    return (0.0, 6.0) if step.target is aten.relu6.default else None


def _activation(step: Step) -> int:
    """The index in reference.ACTIVATIONS of a step that applies it to its operand; 0 for all others."""
    if step.target is aten.gelu.default:
        return {"none": 1, "tanh": 2}.get((*step.args[1:], step.kwargs.get("approximate", "none"))[0], 0)
    return {aten.silu.default: 3, aten.hardswish.default: 4}.get(step.target, 0)
