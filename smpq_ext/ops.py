"""The ops: typed functions, and the rules (fake, gradient, vmap) that make them good citizens of torch.

The kernels live behind `torch.ops.smpq`, in csrc/<op>.cpp; what each computes is in `smpq_ext.reference`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from smpq_ext import reference

OPS = (
    "fake_quantize",
    "fake_quantize_backward",
    "coalition_fake_quantize",
    "coalition_fake_quantize_list",
    "quantization_error",
)
WIDEST = 1 << 16  # no code is beyond, of either sign
ENGINE_OPS = ("coalition_convolution", "coalition_epilogue", "coalition_attention")

try:
    from smpq_ext import _C  # noqa: F401 - registers torch.ops.smpq.*

    compiled = True
except ImportError as error:
    compiled = False
    warnings.warn(
        f"smpq_ext: the compiled kernels cannot be loaded ({error}); plain torch is used, which is many times slower. "
        "`smpq doctor` says more.",
        RuntimeWarning,
        stacklevel=2,
    )
    _fallback = torch.library.Library("smpq", "DEF")
    for _name in (*OPS, *ENGINE_OPS):
        _function = getattr(reference, _name)
        _fallback.define(_name + torch.library.infer_schema(_function, mutates_args=()))
        _fallback.impl(_name, _function, "CPU")
        _fallback.impl(_name, _function, "CUDA")

_smpq = torch.ops.smpq


def bounds(bits: int | Tensor, signed: bool = True) -> tuple[Any, Any]:
    """The codes of a width of 1 to 16 bits: [-2^(bits-1), 2^(bits-1) - 1], or [0, 2^bits - 1] where unsigned."""
    if isinstance(bits, Tensor):
        if bits.is_floating_point():
            raise ValueError("bits: a tensor of widths must be of integers")
        if _readable(bits) and not bool(((bits >= 1) & (bits <= 16)).all()):
            raise ValueError(f"bits: widths from 1 to 16, not {bits.tolist()}")
        one = torch.ones_like(bits, dtype=torch.int32)
        levels = torch.bitwise_left_shift(one, bits.to(torch.int32))
    else:
        if not isinstance(bits, int) or not 1 <= bits <= 16:
            raise ValueError(f"bits: a width from 1 to 16, or an integer tensor of them, not {bits!r}")
        levels = 1 << bits
    return (-(levels // 2), levels // 2 - 1) if signed else (0 * levels, levels - 1)


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None = None,
    *,
    bits: int | Tensor | None = None,
    quant_min: int | Tensor | None = None,
    quant_max: int | Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    signed: bool = True,
) -> Tensor:
    """Round x to the nearest point of a quantization grid, at any width of 1 to 16 bits.

    value = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale, half to even.

    scale, zero_point: [] for the whole tensor, [channels] along `axis`, or x's shape with the last dimension divided by
    `group_size`. An integer zero point is added after rounding, a floating one before, as in torch; the
    results are torch's fake_quantize_per_tensor_affine and _per_channel_affine bit for bit wherever these are defined.
    bits, or quant_min and quant_max: numbers, or integer tensors of scale's shape (a width of its own per channel).
    One bit, signed, without a zero point, is {-1, +1} * scale: the codes -1 and 0 of a grid of step 2 * scale and zero
    point -1/2.
    NaN stays NaN and ±inf saturates to the nearest bound (torch's per-channel op maps both to the lowest code).
    A scale of 0 gives 0 for every finite x. Gradients: straight-through for x, LSQ for scale and floating zero point.

    Raises ValueError for contradicting widths, RuntimeError for shapes, dtypes or devices that do not fit.
    """
    _require("fake_quantize", x=x)
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), dtype=torch.float32, device=x.device)
    if zero_point is not None and not isinstance(zero_point, Tensor):
        zero_point = torch.tensor(zero_point, device=x.device)
    if bits is not None:
        if isinstance(bits, Tensor) and scale.dim() == 0:
            scale = scale.expand(bits.shape)
        if quant_min is not None or quant_max is not None:
            raise ValueError("bits: give either bits, or quant_min and quant_max, not both")
        quant_min, quant_max = bounds(bits, signed)
        if signed and zero_point is None:
            scale, zero_point = _one_bit_grid(bits, scale)
    if quant_min is None or quant_max is None:
        raise ValueError("bits: give bits, or both quant_min and quant_max")
    low, bound_min = _bound(quant_min, scale)
    high, bound_max = _bound(quant_max, scale)
    scale, zero_point = _computable(x, scale, zero_point)
    _check("fake_quantize", x, scale, zero_point, low, high)
    return _smpq.fake_quantize(x, scale, zero_point, low, high, bound_min, bound_max, axis, group_size)


def coalition_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor,
    quant_max: Tensor,
    mixtures: Tensor,
    *,
    axis: int | None = None,
    parent: Tensor | None = None,
) -> Tensor:
    """Fake-quantize x once for every coalition: row i is sum_c mixtures[i, c] * fake_quantize(x, grid c).

    scale, zero_point: [candidates], or [candidates, channels] with `axis`; quant_min, quant_max: int32 [candidates];
    mixtures: float32 [n, candidates], one-hot for an assignment. Returns [n, *x.shape].
    With `parent`, int64 [n], x is [parents, ...] and row i descends from x[parent[i]]; returns [n, *x.shape[1:]]. A
    parent that is not there is an error on the CPU and a row of NaN on CUDA, where looking would wait for the device.
    `axis` counts the dimensions of one row, so it is the same with and without `parent`.
    Gradients flow to x (straight-through) and mixtures.

    Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    _require("coalition_fake_quantize", x=x, scale=scale, quant_min=quant_min, quant_max=quant_max, mixtures=mixtures)
    scale, zero_point = _computable(x, scale, zero_point)
    low, high = quant_min.to(torch.int32), quant_max.to(torch.int32)
    _check("coalition_fake_quantize", x, scale, zero_point, low, high, mixtures, parent)
    return _smpq.coalition_fake_quantize(x, scale, zero_point, low, high, mixtures.to(scale.dtype), axis, parent)


def coalition_fake_quantize_list(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    quant_min: Sequence[Tensor],
    quant_max: Sequence[Tensor],
    mixtures: Sequence[Tensor],
    *,
    axis: int | None = None,
) -> list[Tensor]:
    """`coalition_fake_quantize` of several tensors, such as the weights of all layers, in one launch; no gradients.

    Each list holds one entry per tensor, shaped as there; an empty `zero_point` list means 0 everywhere. All tensors
    share one dtype.

    Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    if not x:
        return []
    zeros = list(zero_point) or [None] * len(x)
    if any(len(part) != len(x) for part in (scale, zeros, quant_min, quant_max, mixtures)):
        raise RuntimeError(f"coalition_fake_quantize_list: every list must have as many entries as x, {len(x)}")
    grids = [_computable(*grid) for grid in zip(x, scale, zeros, strict=True)]
    return list(
        _smpq.coalition_fake_quantize_list(
            list(x),
            [s for s, _ in grids],
            [z for _, z in grids if z is not None],
            [b.to(torch.int32) for b in quant_min],
            [b.to(torch.int32) for b in quant_max],
            [m.to(s.dtype) for m, (s, _) in zip(mixtures, grids, strict=True)],
            axis,
        )
    )


def quantization_error(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor,
    quant_max: Tensor,
    *,
    axis: int | None = None,
) -> Tensor:
    """Sum over x of (fake_quantize(x) - x)^2 for every candidate grid, nothing materialised; no gradients.

    scale, zero_point: [candidates], or [candidates, channels] with `axis`; quant_min, quant_max: int32 [candidates].
    Returns [candidates], or [candidates, channels] with `axis`.

    Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    _require("quantization_error", x=x, scale=scale, quant_min=quant_min, quant_max=quant_max)
    scale, zero_point = _computable(x, scale, zero_point)
    low, high = quant_min.to(torch.int32), quant_max.to(torch.int32)
    _check("quantization_error", x, scale, zero_point, low, high)
    return _smpq.quantization_error(x, scale, zero_point, low, high, axis)


def coalition_linear(x: Tensor, weight: Tensor, bias: Tensor | None, variant: Sequence[int]) -> Tensor:
    """The linear layer for n coalitions: row i is x[i] @ weight[variant[i]].T + bias.

    x: [n, ..., in]; weight: [variants, out, in]; bias: [out] or None; variant: n indices. Returns [n, ..., out].

    Raises RuntimeError for shapes that do not fit.
    """
    _check("coalition_linear", x, weight, bias)
    return _smpq.coalition_linear(x, weight, bias, list(variant))


def coalition_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    variant: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The 2-d convolution for n coalitions: row i is conv2d(x[i], weight[variant[i]], bias).

    x: [n, batch, channels, height, width]; weight: [variants, out, channels / groups, kh, kw]; bias: [out] or None;
    variant: n indices. Returns [n, batch, out, ...].

    Raises RuntimeError for shapes that do not fit.
    """
    _check("coalition_conv2d", x, weight, bias)
    return _smpq.coalition_conv2d(x, weight, bias, list(variant), list(stride), list(padding), list(dilation), groups)


# --- sugar and checks ---


def _require(op: str, **given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not a {type(value).__name__}")


def _check(op: str, x: Tensor, *others: Tensor | None) -> None:
    """What the dispatcher does not see. Raises RuntimeError for other devices, NotImplementedError in forward mode."""
    for other in others:
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{op}: all arguments must be on the device of x, {x.device}, not {other.device}")
    if forward_ad._current_level >= 0 and any(
        t is not None and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None for t in (x, *others)
    ):
        raise NotImplementedError(f"{op}: it has no forward-mode derivative; use reverse mode (torch.autograd.grad)")


def _one_bit_grid(bits: int | Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """{-1, +1} * scale as a uniform grid, where the width is 1; other widths keep their scale and the zero point 0."""
    if isinstance(bits, Tensor):
        one = bits == 1
        return torch.where(one, 2 * scale, scale), torch.where(one, -0.5, 0.0).to(scale.dtype)
    return (2 * scale, torch.full_like(scale, -0.5, requires_grad=False)) if bits == 1 else (scale, None)


def _bound(bound: int | Tensor, scale: Tensor) -> tuple[Tensor | None, int]:
    """A bound as the op takes it: a tensor of scale's shape, or none and a number."""
    if not isinstance(bound, Tensor):
        if not -WIDEST <= bound <= WIDEST:
            raise ValueError(f"quant_min, quant_max: codes have at most 16 bits, not {bound}")
        return None, bound
    if _readable(bound) and bool((bound.abs() > WIDEST).any()):
        raise ValueError("quant_min, quant_max: codes have at most 16 bits")
    return bound.to(torch.int32).expand(scale.shape), 0


def _readable(x: Tensor) -> bool:
    """Whether looking at the numbers is possible, which it is not while tracing, and neither waits for a device."""
    plain = type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _computable(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The parameters in the dtypes that the kernels read: float32, or float64 for a float64 x; integers as int32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if zero_point is not None:
        zero_point = zero_point.to(compute if zero_point.is_floating_point() else torch.int32)
        if zero_point.dim() == 0 and scale.dim() == 1:
            zero_point = zero_point.expand(scale.shape)
    return scale.to(compute), zero_point


# --- the layers for n coalitions: composed of torch's own products, so gradients, vmap and compile follow ---

_library = torch.library.Library("smpq", "FRAGMENT")


def _weights(x: Tensor, weight: Tensor, variant: Sequence[int]) -> list[Tensor]:
    """The weight of each row."""
    if len(variant) != x.shape[0]:
        raise RuntimeError(f"variant: {len(variant)} indices for {x.shape[0]} rows of x")
    if any(not 0 <= v < weight.shape[0] for v in variant):
        raise RuntimeError(f"variant: an index is outside the {weight.shape[0]} variants of weight")
    if not variant:
        raise RuntimeError("x: no rows")
    variants = weight.unbind(0)
    return [variants[v] for v in variant]


def _per_variant(
    x: Tensor, weights: list[Tensor], variant: Sequence[int], layer: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Apply `layer` to each run of rows that share a weight; callers sort rows so that runs are long."""
    starts = [i for i in range(len(variant)) if i == 0 or variant[i] != variant[i - 1]]
    ends = [*starts[1:], len(variant)]
    runs = [layer(x[a:b], weights[a]) for a, b in zip(starts, ends, strict=True)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _coalition_linear(x: Tensor, weight: Tensor, bias: Tensor | None, variant: Sequence[int]) -> Tensor:
    weights = _weights(x, weight, variant)
    if x.is_cuda and len(set(variant)) > 1:
        return _linear_together(x, weights, bias)
    return _per_variant(x, weights, variant, lambda rows, w: F.linear(rows, w, bias))


def _linear_together(x: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """All rows as one batched product."""
    rows, turned = x.unsqueeze(1).flatten(1, -2), torch.stack(weights).mT
    out = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias, rows, turned)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _coalition_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    variant: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weights = _weights(x, weight, variant)
    geometry = stride, padding, dilation
    if x.is_cuda and len(set(variant)) > 1:
        return _conv2d_together(x, weights, bias, *geometry, groups)

    def conv(rows: Tensor, w: Tensor) -> Tensor:  # four dimensions, so that channels-last stays
        return F.conv2d(rows.flatten(0, 1), w, bias, *geometry, groups)

    return _per_variant(x, weights, variant, conv).unflatten(0, x.shape[:2])


def _conv2d_together(
    x: Tensor, weights: list[Tensor], bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """All rows as the groups of one convolution."""
    n = len(weights)
    biases = None if bias is None else bias.repeat(n)
    channels = x.transpose(0, 1).flatten(1, 2)
    out = F.conv2d(channels, torch.cat(weights), biases, stride, padding, dilation, n * groups)
    return out.unflatten(1, (n, -1)).transpose(0, 1)


_library.define("coalition_linear(Tensor x, Tensor weight, Tensor? bias, int[] variant) -> Tensor")
_library.define(
    "coalition_conv2d(Tensor x, Tensor weight, Tensor? bias, int[] variant, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups) -> Tensor"
)
_library.impl("coalition_linear", _coalition_linear, "CompositeImplicitAutograd")
_library.impl("coalition_conv2d", _coalition_conv2d, "CompositeImplicitAutograd")


# --- shapes without data ---


@torch.library.register_fake("smpq::fake_quantize")
def _(x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size):  # type: ignore[no-untyped-def]
    return torch.empty_like(x.contiguous() if group_size is not None else x)


@torch.library.register_fake("smpq::fake_quantize_backward")
def _(grad, x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size, with_scale):  # type: ignore[no-untyped-def]
    parameters = [torch.empty_like(scale) if with_scale else scale.new_empty(0) for _ in range(2)]
    return torch.empty_like(x.contiguous() if group_size is not None else x), *parameters


def _new_rows(x: Tensor, n: int, has_parent: bool) -> Tensor:
    row = x.new_empty(x.shape[1:]) if has_parent and x.shape[0] == 0 else x[0] if has_parent else x
    row = torch.empty_like(row)
    return x.new_empty_strided((n, *row.shape), (row.numel(), *row.stride()))


@torch.library.register_fake("smpq::coalition_fake_quantize")
def _(x, scale, zero_point, quant_min, quant_max, mixtures, axis, parent):  # type: ignore[no-untyped-def]
    return _new_rows(x, mixtures.shape[0], parent is not None)


@torch.library.register_fake("smpq::coalition_fake_quantize_list")
def _(x, scale, zero_point, quant_min, quant_max, mixtures, axis):  # type: ignore[no-untyped-def]
    return [_new_rows(t, m.shape[0], False) for t, m in zip(x, mixtures, strict=True)]


@torch.library.register_fake("smpq::quantization_error")
def _(x, scale, zero_point, quant_min, quant_max, axis):  # type: ignore[no-untyped-def]
    return torch.empty_like(scale, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.register_fake("smpq::coalition_convolution")
def _(x, padding, weight, start, parent, variant, scale, bias, norm, eps, *rest):  # type: ignore[no-untyped-def]
    *_, geometry, _depthwise, values, child_row, _child_grid, child_bits = rest
    sizes = zip(x.shape[2:4], *(geometry[i : i + 2] for i in (0, 2, 4, 6, 8)), strict=True)
    size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, p, q, d in sizes]
    return _new_epilogue(scale, len(parent), [x.shape[1], *size], scale.shape[1], norm, values, child_row, child_bits)


@torch.library.register_fake("smpq::coalition_epilogue")
def _(x, parent, scale, bias, norm, eps, *rest):  # type: ignore[no-untyped-def]
    *_, values, find_nan, child_row, _child_grid, child_bits = rest
    out = _new_epilogue(x, len(parent), x.shape[1:4], x.shape[4], norm, values, child_row, child_bits)
    out.insert(2, x.new_empty((len(parent) if find_nan else 0, x.shape[1]), dtype=torch.bool))
    return out


@torch.library.register_fake("smpq::coalition_attention")
def _(q, k, v, q_row, k_row, v_row, samples, causal, scale):  # type: ignore[no-untyped-def]
    return q.new_empty((len(q_row) * samples, q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _new_epilogue(
    like: Tensor,
    rows: int,
    size: Sequence[int],
    channels: int,
    norm: Tensor | None,
    values: bool,
    child_row: Sequence[Tensor],
    child_bits: Sequence[int],
) -> list[Tensor]:
    kinds = {8: (torch.uint8, 4), 16: (torch.int16, 4), 32: (torch.float32, 1)}
    children = [
        like.new_empty((len(r), *size, -(-channels // kinds[bits][1]) * kinds[bits][1]), dtype=kinds[bits][0])
        for r, bits in zip(child_row, child_bits, strict=True)
    ]
    statistics = like.new_empty((0 if norm is None else rows, 2, channels))
    return [like.new_empty((rows if values else 0, *size, channels)), statistics, *children]


# --- gradients ---


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, low, high = ctx.saved_tensors
    with_scale = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_x, grad_scale, grad_zero_point = _smpq.fake_quantize_backward(
        grad, x, scale, zero_point, low, high, *ctx.settings, with_scale
    )
    return (
        grad_x,
        grad_scale if ctx.needs_input_grad[1] else None,
        grad_zero_point if ctx.needs_input_grad[2] else None,
        *[None] * 6,
    )


torch.library.register_autograd("smpq::fake_quantize", _fake_quantize_backward, setup_context=_save_fake_quantize)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.settings = inputs[6:10]


def _double_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x is linear in grad, with the same mask; through scale and zero point there is no second derivative."""
    return _smpq.fake_quantize_backward(grad, *ctx.saved_tensors, *ctx.settings, False)[0], *[None] * 10


torch.library.register_autograd("smpq::fake_quantize_backward", _double_backward, setup_context=_save_backward)


def _save_coalition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.axis, parent = inputs
    ctx.save_for_backward(*tensors, parent)


def _coalition_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, low, high, mixtures, parent = ctx.saved_tensors
    rows = x.unsqueeze(0) if parent is None else x
    parents = grad.new_zeros(grad.shape[0], dtype=torch.int64) if parent is None else parent
    axis = None if ctx.axis is None else ctx.axis % (rows.dim() - 1) + 1
    weights = mixtures.view(*mixtures.shape, *[1] * (rows.dim() - 1))
    grad_x = torch.zeros_like(rows)
    grad_scale, grad_zero_point, grad_mixtures = [], [], []
    for c in range(scale.shape[0]):
        one = scale[c] if axis is not None else scale[c : c + 1]
        zero = None if zero_point is None else zero_point[c].reshape(one.shape)
        settings = (low[c].expand(one.shape), high[c].expand(one.shape), 0, 0, axis, None)
        received = torch.zeros_like(rows, dtype=mixtures.dtype).index_add(0, parents, grad * weights[:, c])
        part, part_scale, part_zero_point = _smpq.fake_quantize_backward(
            received.to(x.dtype), rows, one, zero, *settings, True
        )
        grad_x = grad_x + part
        grad_scale.append(part_scale.reshape(scale[c].shape))
        grad_zero_point.append(part_zero_point.reshape(scale[c].shape))
        if ctx.needs_input_grad[5]:
            value = _smpq.fake_quantize(rows, one, zero, *settings)
            grad_mixtures.append((grad * value[parents]).to(mixtures.dtype).flatten(1).sum(1))
    needs_zero_point = zero_point is not None and zero_point.is_floating_point()
    return (
        grad_x.reshape(x.shape),
        torch.stack(grad_scale),
        torch.stack(grad_zero_point) if needs_zero_point else None,
        None,
        None,
        torch.stack(grad_mixtures, 1) if grad_mixtures else None,
        None,
        None,
    )


torch.library.register_autograd("smpq::coalition_fake_quantize", _coalition_backward, setup_context=_save_coalition)


# --- vmap ---


@torch.library.register_vmap("smpq::fake_quantize")
def _(info, in_dims, x, scale, zero_point, low, high, bound_min, bound_max, axis, group_size):  # type: ignore[no-untyped-def]
    tensors = (x, scale, zero_point, low, high)
    if any(d is not None for d in in_dims[1:5]):  # a grid for each sample
        parts = [
            _smpq.fake_quantize(
                *(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims[:5], strict=True)),
                *(bound_min, bound_max, axis, group_size),
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(parts), 0
    x = x.movedim(in_dims[0], 0)
    axis = axis if axis is None or axis < 0 else axis + 1
    return _smpq.fake_quantize(x, scale, zero_point, low, high, bound_min, bound_max, axis, group_size), 0


@torch.library.register_vmap("smpq::coalition_fake_quantize")
def _(info, in_dims, x, scale, zero_point, low, high, mixtures, axis, parent):  # type: ignore[no-untyped-def]
    tensors = (x, scale, zero_point, low, high, mixtures, parent)
    dims = (*in_dims[:6], in_dims[7])
    if dims[5] is not None and all(d is None for d in (*dims[:5], dims[6])):  # coalitions: still one launch
        mixtures = mixtures.movedim(dims[5], 0)
        if parent is not None:
            parent = parent.repeat(info.batch_size)
        out = _smpq.coalition_fake_quantize(x, scale, zero_point, low, high, mixtures.flatten(0, 1), axis, parent)
        return out.unflatten(0, mixtures.shape[:2]), 0
    parts = []
    for i in range(info.batch_size):
        *one, one_parent = (t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))
        parts.append(_smpq.coalition_fake_quantize(*one, axis, one_parent))
    return torch.stack(parts), 0
