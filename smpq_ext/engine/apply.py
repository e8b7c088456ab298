"""The model that a plan describes: a copy with the plan's grids and statistics built in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from smpq_ext import ops
from smpq_ext.core import FLOAT_BITS, Grid, Plan, SmpqError
from smpq_ext.engine.layers import duplicate

QUANTIZER = "activation_quantizer"  # the name of the child that every layer with a quantized activation gets


class FakeQuantize(nn.Module):
    """Rounds what enters a layer to a grid; the grid is in the state dict."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, device: torch.device) -> None:
        super().__init__()
        scale, zero_point = _tensors(grid, device)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max

    def forward(self, x: Tensor) -> Tensor:
        return ops.fake_quantize(x, self.scale, self.zero_point, quant_min=self.quant_min, quant_max=self.quant_max)

    def extra_repr(self) -> str:
        return f"codes {self.quant_min} to {self.quant_max}"


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` in eval mode, fake-quantized at the plan: the same inputs and outputs, as floats.

    Weights are rounded in place of the float ones, a FakeQuantize child of every layer rounds what enters it, and
    BatchNorms take the plan's statistics, where it has any. State dicts, deepcopy and torch.compile work as before.

    Raises SmpqError where the plan names a layer that the model has not, or other numbers of channels. That the weights
    are those of the search is for the caller to see to.
    """
    if not isinstance(plan, Plan):
        raise SmpqError(
            f"plan: a Plan is needed, not a {type(plan).__name__}; `search` gives a Result, use result.plan"
        )
    if not isinstance(model, nn.Module):
        raise SmpqError(f"model: an nn.Module is needed, not a {type(model).__name__}")
    copied = duplicate(getattr(model, "_orig_mod", model), share=False)
    rounded: dict[int, tuple[int, nn.Parameter]] = {}  # the float Parameter's id -> width, and what replaces it
    floats = list(copied.parameters())  # kept alive, so that ids stay theirs
    for slot, width in plan.bits.items():
        layer, _, kind = slot.rpartition(".")
        module = _module(copied, layer)
        weight = module._parameters.get("weight")
        if weight is None or kind not in ("weight", "activation"):
            raise SmpqError(f"plan: {slot} is no weight or activation of this model; it was made for another one")
        if width == FLOAT_BITS:
            continue
        grid = plan.grids.get(slot)
        if grid is None:
            raise SmpqError(f"plan: it has no grid for {slot} at {width} bits")
        if not 0 <= 2**width - 1 - (grid.quant_max - grid.quant_min) <= 1:
            codes = grid.quant_max - grid.quant_min + 1
            raise SmpqError(f"plan: {slot} has {width} bits and a grid of {codes} codes; change widths by a new search")
        if kind == "activation":
            if grid.axis is not None:
                raise SmpqError(f"plan: {slot} has {grid.scale.size} scales, and an activation has one")
            module.add_module(QUANTIZER, FakeQuantize(grid, weight.device))
            module.register_forward_pre_hook(_quantize_input)
            continue
        if id(weight) not in rounded:
            rounded[id(weight)] = width, _rounded(slot, grid, weight)
        if rounded[id(weight)][0] != width:
            raise SmpqError(f"plan: {slot} is one Parameter with another layer's weight, and needs the same width")
        # A Parameter of its own: what else shares the float one, such as an embedding, stays float.
        module.weight = rounded[id(weight)][1]
    del floats
    for name, (mean, var) in plan.statistics.items():
        norm = _module(copied, name)
        if not isinstance(norm, _BatchNorm) or norm.num_features != len(mean):
            raise SmpqError(f"plan: {name!r} is no BatchNorm of {len(mean)} channels; it was made for another model")
        like = norm.running_mean if norm.running_mean is not None else norm.weight
        norm.running_mean, norm.running_var = (
            torch.from_numpy(np.array(x, np.float32)).to(*(() if like is None else (like.device, like.dtype)))
            for x in (mean, var)
        )
    return copied


def _rounded(slot: str, grid: Grid, weight: nn.Parameter) -> nn.Parameter:
    _check_channels(slot, grid, weight)
    scale, zero_point = _tensors(grid, weight.device)
    with torch.no_grad():
        value = ops.fake_quantize(
            weight, scale, zero_point, quant_min=grid.quant_min, quant_max=grid.quant_max, axis=grid.axis
        )
    return nn.Parameter(value, requires_grad=weight.requires_grad)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, QUANTIZER)(args[0]), *args[1:])


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise SmpqError(f"plan: this model has no layer {name!r}; the plan was made for another one") from error


def _check_channels(slot: str, grid: Grid, weight: Tensor) -> None:
    shape, axis = tuple(weight.shape), grid.axis
    if axis is not None and (axis not in range(-len(shape), len(shape)) or shape[axis] != grid.scale.size):
        raise SmpqError(
            f"plan: {slot} has {grid.scale.size} scales along axis {axis}, this model's weight is {shape}; "
            "the plan was made for another model"
        )


def _tensors(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and zero point; a whole zero point is an integer, which is added after rounding."""
    zero = np.array(grid.zero_point, np.float32)
    whole = (zero == np.round(zero)).all() and (abs(zero) < 1 << 31).all()
    zero_point = torch.tensor(zero.astype(np.int32) if whole else zero, device=device)
    return torch.tensor(grid.scale, device=device), zero_point
