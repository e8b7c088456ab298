"""The integer path: assignments of at most 8 bits, whose activations stay codes from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smpq_ext.engine.capture import Graph, Step, aten
from smpq_ext.engine.executor import affine
from smpq_ext.engine.grids import Grids

if TYPE_CHECKING:
    from smpq_ext.engine.executor import QuantizedLayer

LANES = 16


class IntegerLayer:
    """A layer's weights at every candidate width, packed for the kernel, and the grids of its input.

    Raises ValueError where integers cannot stand for it.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        module, weight, activation = layer.module, layer.weight, layer.activation
        if weight is None or activation is None or not (layer.linear or layer.conv2d):
            raise ValueError("only quantized nn.Linear and nn.Conv2d")
        if layer.source.dtype != torch.float32 or layer.source.is_cuda:
            raise ValueError("only float32 models on the CPU")
        if int(activation.quant_max.max()) > 255 or int(weight.quant_max.max()) > 127:
            raise ValueError("only widths of at most 8 bits")
        kernel = layer.source if layer.conv2d else layer.source[..., None, None]
        outs = len(kernel)
        self.depthwise = layer.conv2d and module.groups > 1
        if self.depthwise and not module.groups == module.in_channels == outs:
            raise ValueError("no groups of several channels")
        self.conv2d = layer.conv2d
        self.kernel = tuple(kernel.shape[2:])
        self.stride, self.padding, self.dilation = (
            (module.stride, module.padding, module.dilation) if layer.conv2d else ((1, 1), (0, 0), (1, 1))
        )

        steps = weight.scale.double() / torch.where(weight.quant_max == 0, 2, 1)[:, None]  # 1 bit: -1 and 1 half steps
        packed, sums = [], []
        for grid, step in zip(_candidates(weight), steps, strict=True):
            values = torch.ops.smpq.fake_quantize(layer.source, *grid)
            codes = (values / step.view(-1, *[1] * (values.dim() - 1))).nan_to_num().round().to(torch.int8)
            if 2 * 255 * int(codes.flatten(1).abs().sum(1, dtype=torch.int64).max()) >= 2**31:
                raise ValueError("no sums of products beyond 32 bits")
            packed.append((_pack_depthwise if self.depthwise else _pack)(codes.view(1, *kernel.shape)))
            sums.append(codes.flatten(1).sum(1, dtype=torch.int32))
        self.packed = torch.cat(packed)
        self.sums = nn.functional.pad(torch.stack(sums), (0, -outs % LANES))
        self.scale = steps  # [candidates, channels]
        self.bias = torch.zeros(outs, dtype=torch.float64) if module.bias is None else module.bias.detach().double()
        bounds = (activation.quant_min, activation.quant_max)
        self.grids = torch.stack([x.float() for x in (activation.scale, activation.zero_point, *bounds)], 1)


@dataclass(frozen=True)
class Fused:
    """A layer with what follows it, in one call: normalization, a sum, a clamp, and the codes of the next layers."""

    step: int  # of the layer
    layer: IntegerLayer
    source: int  # the step that it reads
    norm: str | None
    geometry: tuple[int, ...]  # kernel, stride, padding before and after, dilation
    residual: int | None
    low: float
    high: float


@dataclass(frozen=True)
class Call:
    """What one call takes for the coalitions that are loaded, whatever the samples."""

    padding: Tensor  # [parents]
    start: Tensor  # [rows, channels up to a multiple of 16]
    parent: Tensor  # [rows]
    variant: Tensor  # [rows]
    scale: Tensor  # [rows, channels]
    bias: Tensor  # [rows, channels]
    norm: Tensor | None  # weight and bias of a normalization by each row's own statistics, [2, channels]
    eps: float


class Integer:
    """What of a graph runs in integers: fused calls by their last step, and the readers of codes by what they read."""

    def __init__(
        self,
        graph: Graph,
        layers: Sequence[QuantizedLayer],
        norms: Mapping[str, _BatchNorm],
        renormalized: Container[str],
    ) -> None:
        self.graph, self.norms, self.renormalized = graph, norms, renormalized
        self.layers: dict[int, IntegerLayer] = {}
        for k, layer in enumerate(layers):
            try:
                self.layers[k] = IntegerLayer(layer)
            except ValueError:
                continue
        self._readers = _readers({i: step.operands for i, step in enumerate(graph.steps)})
        outputs = graph.returned
        self.fused: dict[int, Fused] = {}
        self.absorbed: set[int] = set()  # steps inside of fused calls
        for i, step in enumerate(graph.steps):
            if step.layer in self.layers:
                self._fuse(i, self.layers[step.layer], outputs)
        self.by_step = {f.step: f for f in self.fused.values()}
        # Who reads a value as codes: `epilogue` are the layers of the same layout, whose codes a fused call writes, and
        # `quantized` those that get them from the floating value.
        self.epilogue: dict[int, tuple[int, ...]] = {}
        self.quantized: dict[int, tuple[int, ...]] = {}
        self.with_values = set()  # the fused calls whose floating value is read
        reads = {k: step.operands for k, step in enumerate(graph.steps) if k not in self.absorbed}
        for last, f in self.fused.items():
            reads[last] = (f.source,) if f.residual is None else (f.source, f.residual)
        self.frees = graph.frees(reads)
        for k, found in _readers(reads).items():
            layers = [f for i in found if (f := self.fused.get(i)) is not None and f.source == k]
            own = self.fused.get(k)
            alike = [f.step for f in layers if own is not None and f.layer.conv2d == own.layer.conv2d]
            self.epilogue[k] = tuple(alike)
            self.quantized[k] = tuple(f.step for f in layers if f.step not in alike)
            floating = any(i not in self.fused or self.fused[i].residual == k for i in found)
            if k in outputs or floating or self.quantized[k]:
                self.with_values.add(k)

    def _fuse(self, i: int, layer: IntegerLayer, outputs: set[int]) -> None:
        steps = self.graph.steps
        last, norm, residual, low, high = i, None, None, -math.inf, math.inf
        members = [i]
        while last not in outputs and len(self._readers[last]) == 1:
            follower = self._readers[last][0]
            if follower in self.absorbed or follower in self.fused:
                break  # the sum with an earlier layer, which reads this one's value
            step = steps[follower]
            clamp = _clamp(step)
            if step.norm in self.norms and members == [i]:
                norm = step.norm
            elif step.target is aten.add.Tensor and not step.kwargs and residual is None and len(step.operands) == 2:
                other = next(k for k in step.operands if k != last)
                same = steps[follower].place == steps[i].place and steps[other].place is not None
                if not same or self.graph.kinds[other] != self.graph.kinds[last]:
                    break
                residual = other
            elif clamp is not None:
                low, high = clamp
                last = follower
                members.append(follower)
                break
            else:
                break
            last = follower
            members.append(follower)
        source, (top, left, bottom, right) = steps[i].operands[0], (*layer.padding, *layer.padding)
        if layer.conv2d and (zeros := self._zeros(source)) is not None:
            self.absorbed.add(source)
            source = steps[source].operands[0]
            top, left, bottom, right = (a + b for a, b in zip((top, left, bottom, right), zeros, strict=True))
        geometry = (*layer.kernel, *layer.stride, top, left, bottom, right, *layer.dilation)
        self.fused[last] = Fused(i, layer, source, norm, geometry, residual, low, high)
        self.absorbed.update(members[:-1])

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

    def call(self, fused: Fused, parent: Tensor, activation: Tensor, weight: Tensor) -> Call:
        """The tensors of a call: codes on the grids `activation` [parents], rows `parent` [n], weights `weight` [n]."""
        layer = fused.layer
        grids = layer.grids[activation]
        scale, bias = grids[parent, :1].double() * layer.scale[weight], layer.bias
        norm, eps = None, 0.0
        if fused.norm is not None:
            m = self.norms[fused.norm]
            norm, eps = affine(m), m.eps
            if fused.norm not in self.renormalized:
                assert m.running_mean is not None and m.running_var is not None
                factor = norm[0] * (m.running_var.double() + eps).rsqrt()
                scale, bias = scale * factor, (bias - m.running_mean.double()) * factor + norm[1]
                norm = None
        zero = grids[:, 1].int()
        return Call(
            padding=zero.to(torch.uint8),
            start=-zero[parent, None] * layer.sums[weight],
            parent=parent,
            variant=weight,
            scale=scale.float().contiguous(),
            bias=bias.float().expand_as(scale).contiguous(),
            norm=norm,
            eps=eps,
        )


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


def _candidates(grids: Grids) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, None]]:
    """The arguments of torch.ops.smpq.fake_quantize for every candidate of a weight's grids."""
    return [
        (scale, zero.to(scale.dtype), low.expand(scale.shape), high.expand(scale.shape), 0, 0, 0, None)
        for scale, zero, low, high in zip(grids.scale, grids.zero_point, grids.quant_min, grids.quant_max, strict=True)
    ]


def _pack(codes: Tensor) -> Tensor:
    """[variants, out, in, kh, kw] as int8 [variants, blocks of 16 out, taps, in / 4, 16, 4], zeros where none is."""
    variants, outs, channels = codes.shape[:3]
    padded = nn.functional.pad(codes, (0, 0, 0, 0, 0, -channels % 4, 0, -outs % LANES)).to(torch.int8)
    blocks = padded.view(variants, -1, LANES, padded.shape[2] // 4, 4, codes.shape[3] * codes.shape[4])
    return blocks.permute(0, 1, 5, 3, 2, 4).contiguous()


def _pack_depthwise(codes: Tensor) -> Tensor:
    """[variants, channels, 1, kh, kw] as int8 [variants, blocks of 16 channels, taps, 16]."""
    variants, channels = codes.shape[:2]
    padded = nn.functional.pad(codes.flatten(2), (0, 0, 0, -channels % LANES)).to(torch.int8)
    return padded.view(variants, -1, LANES, padded.shape[2]).transpose(2, 3).contiguous()
