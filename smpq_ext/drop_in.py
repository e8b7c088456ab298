"""Drop-in replacement of torch's fake quantization: the same outputs and gradients bit for bit, from our kernels.

`patched()` redirects torch's functions, `replace_fake_quant` swaps torch.ao's modules. What our kernels do not compute
as torch does (float64, codes beyond 16 bits), and every call that torch refuses, is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import fake_quantize as ao
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from smpq_ext import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 16  # the codes that the kernels take; torch takes any int64


def patched() -> TorchFunctionMode:
    """Redirect torch's fake-quantize functions to ours inside a `with` block, in the thread that enters it.

    They are torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine and
    torch.fused_moving_avg_obs_fake_quant, whoever calls them. Blocks nest, and a block may be compiled or be around a
    compiled call. Unlike torch's, our ops keep their input for the backward pass, not a mask: autograd raises
    RuntimeError where it was written to in between. On a device, integer zero points are not checked: that would wait.
    """
    return _Patched()


def replace_fake_quant(model: nn.Module) -> nn.Module:
    """Swap torch.ao's FakeQuantize modules for ours, in place, and return the model; `restore_fake_quant` undoes it.

    Parameters, buffers, hooks and names stay the same objects, so optimizers, checkpoints and traced graphs keep
    working. FakeQuantize, FixedQParamsFakeQuantize and FusedMovingAvgObsFakeQuantize are swapped; subclasses of them
    written elsewhere are left alone (`patched()` reaches these). torch.compile takes the fused modules into its graph,
    once a first call has sized the per-channel ones; the others break it, as torch's do.
    """
    return _swap(model, _MODULES.items())


def restore_fake_quant(model: nn.Module) -> nn.Module:
    """Undo `replace_fake_quant`, in place, and return the model."""
    return _swap(model, ((ours, theirs) for theirs, ours in _MODULES.items()))


def _swap(model: nn.Module, pairs: Iterable[tuple[type, type]]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: an nn.Module is needed, not a {type(model).__name__}")
    other = dict(pairs)
    for module in model.modules():
        # Ours differ in `forward` alone, so that the class is all there is to swap.
        module.__class__ = other.get(type(module), type(module))
    return model


# --- the functions ---------------------------------------------------------------------------------------------------


def _per_tensor(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """torch.fake_quantize_per_tensor_affine."""
    if isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        # An integer tensor may be out of range here, and a floating one is truncated: torch's words.
        fits = scale.numel() == zero_point.numel() == 1 and not zero_point.is_floating_point()
    else:
        fits = isinstance(scale, float | int) and isinstance(zero_point, int) and quant_min <= zero_point <= quant_max
    if not fits or not _covered(input, scale, quant_min, quant_max):
        return torch.fake_quantize_per_tensor_affine(input, scale, zero_point, quant_min, quant_max)  # type: ignore[arg-type]
    return _fake_quantize(input, scale, zero_point, quant_min, quant_max)


def _per_channel(input: Tensor, scale: Tensor, zero_point: Tensor, axis: int, quant_min: int, quant_max: int) -> Tensor:
    """torch.fake_quantize_per_channel_affine."""
    fits = (
        0 <= axis < input.dim()
        and scale.shape == zero_point.shape == (input.shape[axis],)
        and zero_point.dtype in (torch.int32, torch.float32)
        and _covered(input, scale, quant_min, quant_max)
        and _within(zero_point, quant_min, quant_max)
    )
    if not fits:
        return torch.fake_quantize_per_channel_affine(input, scale, zero_point, axis, quant_min, quant_max)
    return _fake_quantize(input, scale, zero_point, quant_min, quant_max, axis)


def _fused(
    input: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_const: float,
    quant_min: int,
    quant_max: int,
    ch_axis: int,
    per_row_fake_quant: bool = False,
    symmetric_quant: bool = False,
) -> Tensor:
    """torch.fused_moving_avg_obs_fake_quant."""
    state = (observer_on, fake_quant_on, running_min, running_max, scale, zero_point, averaging_const)
    settings = (quant_min, quant_max, ch_axis, per_row_fake_quant, symmetric_quant)
    rows_fit = not per_row_fake_quant or (ch_axis == 0 and input.dim() > 1)
    if not (rows_fit and input.numel() and input.dtype == torch.float32):
        return torch.fused_moving_avg_obs_fake_quant(input, *state, *settings)
    tracing = torch.compiler.is_compiling()
    if tracing and per_row_fake_quant and running_min.numel() == 0:
        return _fused_eager(input, *state, *settings)  # the first call resizes the state, which no graph can
    # torch's op sees its input through the extremes alone: two numbers a row update the state as the input would.
    if tracing or _is_on(observer_on):
        x = input.detach()
        lowest, highest = torch.aminmax(x.flatten(1), dim=1) if per_row_fake_quant else torch.aminmax(x)
        extremes = torch.stack((lowest, highest), -1)
    else:
        extremes = input.new_zeros((input.shape[0], 2) if per_row_fake_quant else 2)
    torch.fused_moving_avg_obs_fake_quant(extremes, *state, *settings)
    if not tracing and not _is_on(fake_quant_on):
        return input.clone()
    if per_row_fake_quant:
        output = _per_channel(input, scale, zero_point, ch_axis, quant_min, quant_max)
    else:
        output = _per_tensor(input, scale, zero_point, quant_min, quant_max)
    # A traced graph holds both cases, for the switch is a tensor in it.
    return torch.where(fake_quant_on != 0, output, input) if tracing else output


_fused_eager = torch.compiler.disable(_fused)


def _fake_quantize(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
) -> Tensor:
    if input.requires_grad and isinstance(scale, Tensor) and isinstance(zero_point, Tensor):
        # Our op keeps the grid for the backward pass, and an observer may write to it before that.
        scale, zero_point = scale.clone(), zero_point.clone()
    return ops.fake_quantize(input, scale, zero_point, quant_min=quant_min, quant_max=quant_max, axis=axis)


def _covered(input: Tensor, scale: Tensor | float, quant_min: int, quant_max: int) -> bool:
    """Whether our kernels compute what torch does; that torch refuses a scale that requires a gradient is kept too."""
    if isinstance(scale, Tensor) and (
        scale.dtype != torch.float32 or scale.device != input.device or scale.requires_grad
    ):
        return False
    return input.dtype in _DTYPES and -_LARGEST <= quant_min <= quant_max <= _LARGEST


def _within(zero_point: Tensor, quant_min: int, quant_max: int) -> bool:
    """torch's check of integer zero points, where it neither waits for a device nor breaks a graph."""
    if zero_point.is_floating_point() or not zero_point.is_cpu or torch.compiler.is_compiling():
        return True
    lowest, highest = zero_point.aminmax()
    return quant_min <= int(lowest) and int(highest) <= quant_max


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _is_on(switch: Tensor) -> bool:
    """The value of a module's switch, read from a device only when it was written since the last time."""
    if switch.is_cpu:
        return bool(switch)
    version, on = _read.get(switch, (None, False))
    if version != switch._version:
        on = bool(switch)
        _read[switch] = switch._version, on
    return on


_FUNCTIONS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    torch.fake_quantize_per_tensor_affine: _per_tensor,
    torch.fake_quantize_per_channel_affine: _per_channel,
    torch.fused_moving_avg_obs_fake_quant: _fused,
}


class _Patched(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


# --- the modules -----------------------------------------------------------------------------------------------------


class FakeQuantize(ao.FakeQuantize):
    """torch.ao's FakeQuantize with our kernels."""

    @torch.compiler.disable  # as torch's own: observers branch on values
    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        if self.observer_enabled:
            self.activation_post_process(X.detach())
            scale, zero_point = self.calculate_qparams()
            if self.scale.shape != scale.shape:
                self.scale.resize_(scale.shape)
                self.zero_point.resize_(zero_point.shape)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if not self.fake_quant_enabled:
            return X
        observer = self.activation_post_process
        if self.is_per_channel:
            return _per_channel(X, self.scale, self.zero_point, self.ch_axis, observer.quant_min, observer.quant_max)
        return _per_tensor(X, self.scale, self.zero_point, observer.quant_min, observer.quant_max)


class FixedQParamsFakeQuantize(FakeQuantize, ao.FixedQParamsFakeQuantize):
    """torch.ao's FixedQParamsFakeQuantize with our kernels."""


class FusedMovingAvgObsFakeQuantize(ao.FusedMovingAvgObsFakeQuantize):
    """torch.ao's FusedMovingAvgObsFakeQuantize with our kernels."""

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        observer = self.activation_post_process
        return _fused(
            X,
            self.observer_enabled,
            self.fake_quant_enabled,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            observer.quant_min,
            observer.quant_max,
            self.ch_axis,
            self.is_per_channel,
            self.is_symmetric_quant,
        )


_MODULES: dict[type, type] = {
    ao.FakeQuantize: FakeQuantize,
    ao.FixedQParamsFakeQuantize: FixedQParamsFakeQuantize,
    ao.FusedMovingAvgObsFakeQuantize: FusedMovingAvgObsFakeQuantize,
}
