"""Calibrates the grids of a slot, all candidate widths at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from smpq_ext import ops
from smpq_ext.core import FLOAT_BITS, Grid, SmpqError, Space
from smpq_ext.engine import samples
from smpq_ext.engine.layers import Layer
from smpq_ext.engine.samples import Batch

Calibrate = Literal["mse", "minmax", "percentile"]
SAMPLE = 1 << 18  # elements of an activation that the search looks at
COARSE = torch.logspace(math.log10(0.02), 0, 40)  # clip ratios of the first search, 10 % apart
FINE = torch.linspace(0.9, 1.1, 17)  # and of the second, around the best of the first
WIDE, NARROW = 2 ** torch.linspace(-1, 1, 7), torch.linspace(0.9, 1.1, 5)  # where the two sides of a range part
WIDE_CODES = 4  # up to so many bits one code more or less matters
WEIGHT_PERCENTILE, ACTIVATION_PERCENTILE = 0.999, 0.9999


@dataclass(frozen=True)
class Grids:
    """The grids of one slot: scale and zero_point [candidates] or [candidates, channels], bounds int32 [candidates]."""

    scale: Tensor
    zero_point: Tensor
    quant_min: Tensor
    quant_max: Tensor
    axis: int | None

    def grid(self, candidate: int) -> Grid:
        return Grid(
            self.scale[candidate].cpu().numpy().astype(np.float32),
            self.zero_point[candidate].cpu().numpy().astype(np.float32),
            int(self.quant_min[candidate]),
            int(self.quant_max[candidate]),
            self.axis,
        )


@dataclass
class Observed:
    """What entered a layer: the true range, and a sample of the elements."""

    low: float = math.inf
    high: float = -math.inf
    sample: Tensor | None = None  # [elements]

    def add(self, x: Tensor, limit: int) -> None:
        """Take note of x, keeping at most `limit` of its elements, evenly strided."""
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        stride = -(-x.numel() // limit) | 1  # odd, so that it does not walk along one column of an image
        kept = x.reshape(-1)[::stride].float()
        self.sample = kept.clone() if self.sample is None else torch.cat([self.sample, kept])


def observe(model: nn.Module, layers: list[Layer], batches: tuple[Batch, ...]) -> dict[str, Observed]:
    """What enters every layer of the float model. Raises SmpqError where it is not finite."""
    total = sum(b.size for b in batches)
    seen = {layer.name: Observed() for layer in layers}
    share = 0  # of SAMPLE, for one call on the batch in hand

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.isfinite(args[0]).all():
                if given := samples.non_finite(batches):
                    raise SmpqError(f"data: {given}, and it reaches layer {name!r}; leave the sample out")
                raise SmpqError(
                    f"model: what enters layer {name!r} holds NaN or infinity; look at the layers before it"
                )
            seen[name].add(args[0], share)

        return hook

    handles = [layer.module.register_forward_pre_hook(watch(layer.name)) for layer in layers]
    try:
        for item, batch in enumerate(batches):
            share = max(1, SAMPLE * batch.size // total)
            samples.run(model, batch, item)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def calibrate(layers: list[Layer], space: Space, seen: Mapping[str, Observed], how: Calibrate) -> dict[str, Grids]:
    """The grids of every slot that is not float."""
    widths = {s.name: c for s, c in zip(space.slots, space.candidates, strict=True)}
    widths |= {s.name: (w,) for s, w in space.fixed if w != FLOAT_BITS}
    signed: dict[int, bool] = {}  # of what meets a weight; layers that share one have one grid
    for layer in layers:
        key = layer.weight.data_ptr()
        signed[key] = signed.get(key, True) and seen[layer.name].low < 0
    found: dict[str, Grids] = {}
    for layer in layers:
        if (name := f"{layer.name}.weight") in widths:
            both = signed[layer.weight.data_ptr()]
            found[name] = weight_grids(layer.weight, layer.axis, widths[name], how, both)
        if (name := f"{layer.name}.activation") in widths:
            found[name] = activation_grids(seen[layer.name], widths[name], how)
    return found


def weight_grids(
    weight: Tensor, axis: int, widths: tuple[int, ...], calibrate: Calibrate, both_signs: bool = False
) -> Grids:
    """Symmetric grids per output channel, codes [1 - 2^(b-1), 2^(b-1) - 1]; 1 bit is {-1, +1} * mean|w|.

    The code -2^(b-1) is left out: with it the errors of a channel do not average out, and where what enters the layer
    is never negative, as after ReLU, they add up to a shift of its output that is worse than the error it saves. With
    inputs of `both_signs` they cancel, and up to 4 bits the code is used (both measured, docs/performance.md).
    The zero point is an integer tensor of zeros, or -1/2 where a width is 1 bit.
    """
    w = weight.detach().movedim(axis, 0).float()
    w = w.reshape(w.shape[0], -1)
    low, high = _bounds(widths, signed=True, device=w.device)
    wide = torch.tensor([both_signs and b <= WIDE_CODES for b in widths], device=w.device)
    low = torch.where((high == 0) | wide, low, -high)
    if calibrate == "percentile":
        k = max(1, math.ceil(WEIGHT_PERCENTILE * w.shape[1]))
        top = w.abs().kthvalue(k, dim=1).values
        least = (top / high.clamp(min=1)[:, None]).expand(len(widths), -1)
    else:
        top, bottom = w.amax(1).clamp(min=0), w.amin(1).clamp(max=0)
        least = torch.maximum(top / high.clamp(min=1)[:, None], bottom / low[:, None])  # nothing is clipped
    scale = least  # [widths, channels]
    if calibrate == "mse":
        for ratios in (COARSE, FINE):
            tried = scale.unsqueeze(1) * ratios.to(w.device)[:, None]  # [widths, ratios, channels]
            best = _errors(w, tried, None, low, high, 0).argmin(1, keepdim=True)  # [widths, 1, channels]
            scale = tried.gather(1, best).squeeze(1)
    one_bit = torch.tensor([b == 1 for b in widths], device=w.device)[:, None]
    scale = torch.where(one_bit, 2 * w.abs().mean(1), scale)
    # An all-zero channel: any step gives 0, but for 1 bit, which has no 0, only a step of 0 does.
    scale = torch.where(scale > 0, scale, (~one_bit).to(scale.dtype))
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if 1 in widths:
        zero = (one_bit.to(scale.dtype) * -0.5).expand_as(scale).contiguous()
    return Grids(scale, zero, low, high, axis)


def activation_grids(seen: Observed, widths: tuple[int, ...], calibrate: Calibrate) -> Grids:
    """Grids per tensor, codes [0, 2^b - 1]: zero point 0 where nothing is negative, else an integer code."""
    assert seen.sample is not None
    x = seen.sample
    low, high = _bounds(widths, signed=False, device=x.device)
    bottom, top = min(seen.low, 0.0), max(seen.high, 0.0)
    if calibrate == "percentile":
        k = max(1, math.ceil(ACTIVATION_PERCENTILE * x.numel()))
        top = max(0.0, float(x.kthvalue(k).values))
        bottom = min(0.0, float(x.kthvalue(x.numel() + 1 - k).values))
    clip = torch.tensor([bottom, top], dtype=x.dtype, device=x.device)
    start = clip.expand(len(widths), 2)  # clipping bounds of each width
    if calibrate == "mse":
        # First both sides shrink together, then each for itself; a side at 0 stays there.
        sides = (COARSE[:, None].expand(-1, 2), torch.cartesian_prod(WIDE, WIDE), torch.cartesian_prod(NARROW, NARROW))
        for ratios in sides if bottom < 0 < top else (COARSE[:, None].expand(-1, 2), FINE[:, None].expand(-1, 2)):
            tried = start.unsqueeze(1) * ratios.to(x.device)  # [widths, ratios, 2]
            best = _errors(x, *_affine(tried, high[:, None]), low, high, None).argmin(1)  # [widths]
            start = tried[torch.arange(len(widths), device=x.device), best]
    scale, zero = _affine(start, high)
    return Grids(scale, zero, low, high, None)


def _affine(clip: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of the codes [0, high] over the range clip [..., 2]."""
    scale = (clip[..., 1] - clip[..., 0]) / high
    scale = torch.where(scale > 0, scale, 1.0)  # a constant 0: any step gives 0
    zero = torch.minimum(torch.round(-clip[..., 0] / scale), high).to(torch.int32)
    return scale, zero


def _errors(x: Tensor, scale: Tensor, zero: Tensor | None, low: Tensor, high: Tensor, axis: int | None) -> Tensor:
    """Squared error of the grids scale [widths, ratios, ...], in its shape, in one call."""
    ratios = scale.shape[1]
    error = ops.quantization_error(
        x,
        scale.flatten(0, 1),
        None if zero is None else zero.flatten(0, 1),
        low.repeat_interleave(ratios),
        high.repeat_interleave(ratios),
        axis=axis,
    )
    return error.unflatten(0, (-1, ratios))


def _bounds(widths: tuple[int, ...], signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    low, high = zip(*(ops.bounds(b, signed) for b in widths), strict=True)
    return torch.tensor(low, dtype=torch.int32, device=device), torch.tensor(high, dtype=torch.int32, device=device)
