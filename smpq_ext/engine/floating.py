"""Layers in floating point: mixtures of widths, widths beyond 8 bits, and what is not quantized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smpq_ext.engine.executor import QuantizedLayer
from smpq_ext.engine.fusion import LANES, Product, is_depthwise, pack


class FloatLayer:
    """A layer's weights as they are loaded, packed for the kernel, and the grids of its input.

    Raises ValueError where the kernel has no such layer.
    """

    bits = 32

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer = layer
        kernel, self.groups = kernel_of(layer, layer.source)
        self.depthwise = is_depthwise(kernel, self.groups)
        self._unquantized = pack(kernel[None], self.groups, 1) if layer.weight is None else None
        self._channels = len(kernel)
        self._device = kernel.device
        self._grids = torch.empty(0, 4, device=self._device)  # [candidates, 4]
        if (g := layer.activation) is not None:
            if g.zero_point.is_floating_point():
                raise ValueError("only whole zero points of activations")
            self._grids = torch.stack([x.float() for x in (g.scale, g.zero_point, g.quant_min, g.quant_max)], 1)
        self._packed, self._variant = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def load(self, assigned: Mapping[str, NDArray[np.int64]] | None) -> None:
        if self._unquantized is None:
            variants = self.layer.variants
            kernels = variants if self.layer.conv2d else variants[..., None, None]
            self._packed = pack(kernels, self.groups, 1)
            self._variant = torch.tensor(self.layer.variant, device=self._device)
        else:
            self._packed, self._variant = self._unquantized, self._first()

    def _first(self) -> Tensor:
        """The variant of every row where there is but one."""
        return torch.zeros(self.layer.executor.rows, dtype=torch.int64, device=self._device)

    def unload(self) -> None:
        self._packed, self._variant = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def grids(self, coalitions: Tensor) -> Tensor:
        """Scale, zero point, bounds and share of every candidate, [n, candidates, 5]."""
        shares = self.layer.mixtures[coalitions]
        return torch.cat([self._grids.expand(len(shares), -1, -1), shares[..., None]], 2)

    def product(self, parents: Tensor, parent: Tensor, coalitions: Tensor) -> Product:
        n = len(coalitions)
        return Product(
            padding=torch.zeros(len(parents), dtype=torch.float32, device=self._device),
            weight=self._packed,
            start=torch.zeros(n, -(-self._channels // LANES) * LANES, dtype=torch.float32, device=self._device),
            variant=self._variant[coalitions],
            scale=torch.ones(n, self._channels, dtype=torch.float64, device=self._device),
            bias=self.layer.bias,
        )


def kernel_of(layer: QuantizedLayer, weight: Tensor) -> tuple[Tensor, int]:
    """The weight as that of a 2-d convolution, [out, in / groups, kh, kw], and its groups.

    Raises ValueError where the kernel has no such layer.
    """
    if not (layer.linear or layer.conv2d):
        raise ValueError("only nn.Linear and nn.Conv2d")
    if weight.dtype != torch.float32:
        raise ValueError("only float32 models")
    kernel = weight if layer.conv2d else weight[..., None, None]
    return kernel, layer.module.groups if layer.conv2d else 1
