"""Mixtures in 16-bit fixed point: products of whole numbers, exact, and twice as fast as floats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smpq_ext.engine.executor import QuantizedLayer
from smpq_ext.engine.floating import FloatLayer
from smpq_ext.engine.fusion import LANES, Product, pack

LARGEST = 2**31 * 0.95  # of a sum of products; the rest is for what rounding adds


class FixedLayer(FloatLayer):
    """As FloatLayer, inputs and weights being whole numbers of steps, as many as sums of 32 bits leave room for.

    With n products in a sum, inputs have up to sqrt(5 * 2^31 / n) steps, so that both sides err by about the same share
    of the sum: an input is a fifth of its range on the mean.

    Raises ValueError where fixed point cannot stand for it.
    """

    bits = 16

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        if layer.activation is None:
            raise ValueError("only where the input is quantized, and so bounded")
        products = layer.source[0].numel()
        self._input = min(32767, int((5 * LARGEST / products) ** 0.5))  # the largest
        if self._input * products / 2 > 2**31 - LARGEST:  # half a step of each weight, in rounding
            raise ValueError("no sums of products beyond 32 bits")
        self._far = (self._grids[:, 2:] - self._grids[:, 1:2]).abs().amax(1) * self._grids[:, 0].abs()
        self._steps = torch.empty(0)  # of the weights, [variants, channels]

    def load(self, assigned: Mapping[str, NDArray[np.int64]] | None) -> None:
        weight = self.layer.source[None] if self._unquantized is not None else self.layer.variants
        kernels = weight if self.layer.conv2d else weight[..., None, None]
        sizes = kernels.abs().flatten(2)
        self._steps = (
            torch.maximum(sizes.amax(2) / 32767, sizes.sum(2) * (self._input / LARGEST)).clamp(min=1e-30).double()
        )
        whole = (kernels / self._steps[..., None, None, None]).round().to(torch.int16)
        self._packed = pack(whole, self.groups, 2)
        one = self._unquantized is not None
        self._variant = self._first() if one else torch.tensor(self.layer.variant, device=self._device)

    def _step(self, coalitions: Tensor) -> Tensor:
        """Of the inputs of these coalitions, [n, 1]."""
        shares = self.layer.mixtures[coalitions].abs()
        return ((shares * self._far).sum(1, keepdim=True) / self._input).clamp(min=1e-30)

    def grids(self, coalitions: Tensor) -> Tensor:
        """Scale, zero point, bounds and share of every candidate, [n, candidates, 5]; shares in steps."""
        grids = super().grids(coalitions)
        grids[..., 4] /= self._step(coalitions)
        return grids

    def product(self, parents: Tensor, parent: Tensor, coalitions: Tensor) -> Product:
        variant = self._variant[coalitions]
        return Product(
            padding=torch.zeros(len(parents), dtype=torch.int16, device=self._device),
            weight=self._packed,
            start=torch.zeros(
                len(coalitions), -(-self._channels // LANES) * LANES, dtype=torch.int32, device=self._device
            ),
            variant=variant,
            scale=self._step(parents)[parent].double() * self._steps[variant],
            bias=self.layer.bias,
        )
