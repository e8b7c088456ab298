"""Layers of assignments of at most 8 bits: activations stay codes from layer to layer, products are exact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smpq_ext.engine.executor import QuantizedLayer
from smpq_ext.engine.floating import kernel_of
from smpq_ext.engine.fusion import LANES, Product, is_depthwise, pack
from smpq_ext.engine.grids import Grids


class IntegerLayer:
    """A layer's weights at every candidate width, packed for the kernel, and the grids of its input.

    Raises ValueError where integers cannot stand for it.
    """

    bits = 8

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        weight, activation = layer.weight, layer.activation
        if weight is None or activation is None:
            raise ValueError("only where weight and input are quantized")
        if int(activation.quant_max.max()) > 255 or int(weight.quant_max.max()) > 127:
            raise ValueError("only widths of at most 8 bits")
        kernel, groups = kernel_of(layer, layer.source)
        self.depthwise = is_depthwise(kernel, groups)
        outs = len(kernel)
        steps = weight.scale.double() / torch.where(weight.quant_max == 0, 2, 1)[:, None]  # 1 bit: -1 and 1 half steps
        packed, sums = [], []
        for grid, step in zip(_candidates(weight), steps, strict=True):
            values = torch.ops.smpq.fake_quantize(layer.source, *grid)
            codes = (values / step.view(-1, *[1] * (values.dim() - 1))).nan_to_num().round().to(torch.int8)
            if 2 * 255 * int(codes.flatten(1).abs().sum(1, dtype=torch.int64).max()) >= 2**31:
                raise ValueError("no sums of products beyond 32 bits")
            packed.append(pack(codes.view(1, *kernel.shape), groups, 4))
            sums.append(codes.flatten(1).sum(1, dtype=torch.int32))
        self._packed = torch.cat(packed)
        self._sums = nn.functional.pad(torch.stack(sums), (0, -outs % LANES))
        self._scale = steps  # [candidates, channels]
        self._bias = layer.bias
        bounds = (activation.quant_min, activation.quant_max)
        self._grids = torch.stack([x.float() for x in (activation.scale, activation.zero_point, *bounds)], 1)
        self._activation = self._weight = torch.empty(0, dtype=torch.int64)  # the candidate of every coalition

    def load(self, assigned: Mapping[str, NDArray[np.int64]] | None) -> None:
        assert assigned is not None
        names = (f"{self.layer.name}.{kind}" for kind in ("activation", "weight"))
        chosen = (np.ascontiguousarray(assigned[name], np.int64) for name in names)
        self._activation, self._weight = (torch.from_numpy(x).to(self._packed.device) for x in chosen)

    def unload(self) -> None:
        self._activation = self._weight = torch.empty(0, dtype=torch.int64)

    def grids(self, coalitions: Tensor) -> Tensor:
        """Scale, zero point and bounds, [n, 4]."""
        return self._grids[self._activation[coalitions]]

    def product(self, parents: Tensor, parent: Tensor, coalitions: Tensor) -> Product:
        grids, variant = self.grids(parents), self._weight[coalitions]
        zero = grids[:, 1].int()
        return Product(
            padding=zero.to(torch.uint8),
            weight=self._packed,
            start=-zero[parent, None] * self._sums[variant],
            variant=variant,
            scale=grids[parent, :1].double() * self._scale[variant],
            bias=self._bias,
        )


def _candidates(grids: Grids) -> list[tuple[Tensor, Tensor, Tensor, Tensor, int, int, int, None]]:
    """The arguments of torch.ops.smpq.fake_quantize for every candidate of a weight's grids."""
    return [
        (scale, zero.to(scale.dtype), low.expand(scale.shape), high.expand(scale.shape), 0, 0, 0, None)
        for scale, zero, low, high in zip(grids.scale, grids.zero_point, grids.quant_min, grids.quant_max, strict=True)
    ]
