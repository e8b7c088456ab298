"""Every op in plain torch: the specification, the test oracle, the baseline, and the fallback without the extension.

The signatures are those of the torch ops (`torch.ops.smpq.*`); the public functions of `smpq_ext.ops` add the sugar.
A grid is (scale, zero_point, bounds): value = (code - zero_point) * scale with code in [quant_min, quant_max].
Results are bit-equal to the kernels' for float32, bfloat16 and float16, except the sums of `quantization_error` and of
the gradients, which are equal up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def broadcast(parameter: Tensor, x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """View a parameter per tensor [] or [1], per channel [channels] or per group [..., groups, ...] so that it meets x.

    With groups, x is to be seen through `grouped`.
    """
    if group_size is not None:
        return parameter.unsqueeze((-1 if axis is None else axis) % x.dim() + 1)
    if parameter.numel() == 1 and axis is None:
        return parameter.reshape(())
    assert axis is not None
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def grouped(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """x with the grouped axis split into [groups, group_size]; x itself without groups."""
    if group_size is None:
        return x
    axis = (-1 if axis is None else axis) % x.dim()
    return x.unflatten(axis, (-1, group_size))


def raw_code(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The code before clamping; an integer zero point is added after rounding, a floating one before, as in torch."""
    limit = torch.finfo(scale.dtype).max
    inverse = torch.where(scale == 0, 0, (1 / scale).clamp(-limit, limit))
    if zero_point is None:
        return torch.round(x * inverse) + 0.0
    if not zero_point.is_floating_point():
        return torch.round(x * inverse) + zero_point.to(x.dtype)
    fused = x.double() * inverse.double() + zero_point.double()  # one rounding, as fma
    return torch.round(fused.to(x.dtype)) + 0.0


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor | None,
    quant_max: Tensor | None,
    bound_min: int,
    bound_max: int,
    axis: int | None,
    group_size: int | None,
) -> Tensor:
    value, _, _ = _forward(x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size)
    return value.to(x.dtype).reshape(x.shape).clone(memory_format=torch.preserve_format)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor | None,
    quant_max: Tensor | None,
    bound_min: int,
    bound_max: int,
    axis: int | None,
    group_size: int | None,
    with_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (straight-through), and of scale and zero point (LSQ, Esser et al. 2020, eq. 3) if wanted."""
    value, raw, code = _forward(x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size)
    inside = raw == code
    grad_ = grouped(grad, axis, group_size).to(value.dtype)
    x_ = grouped(x, axis, group_size).to(value.dtype)
    grad_x = (grad_ * inside).to(x.dtype).reshape(x.shape)
    if not with_scale:
        return grad_x, scale.new_empty(0), scale.new_empty(0)
    s = broadcast(scale, x, axis, group_size)
    z = torch.zeros_like(s) if zero_point is None else broadcast(zero_point, x, axis, group_size).to(value.dtype)
    grad_scale = grad_ * torch.where(inside, (value - x_) / s, code - z)
    grad_zero_point = torch.where(inside, 0, -(grad_ * s))
    return (
        grad_x,
        grad_scale.sum_to_size(s.shape).reshape(scale.shape),
        grad_zero_point.sum_to_size(s.shape).reshape(scale.shape),
    )


def coalition_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor,
    quant_max: Tensor,
    mixtures: Tensor,
    axis: int | None,
    parent: Tensor | None,
) -> Tensor:
    """Row i is sum_c mixtures[i, c] * fake_quantize(x[parent[i]], grid c), added in the order of c in float32.

    A weight of 0 adds nothing, and a weight of 1 does not multiply: a one-hot row is `fake_quantize` bit for bit.
    """
    rows = x.unsqueeze(0) if parent is None else x
    row_axis = None if axis is None else axis % (rows.dim() - 1)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = []
    for c in range(scale.shape[0]):
        zero = None if zero_point is None else zero_point[c]
        low, high = int(quant_min[c]), int(quant_max[c])
        channel_axis = None if row_axis is None else row_axis + 1
        value, _, _ = _forward(rows, scale[c], zero, None, None, low, high, channel_axis, None)
        values.append(value)
    out = []
    for i in range(mixtures.shape[0]):
        p = 0 if parent is None else int(parent[i])
        total = None
        for c, value in enumerate(values):
            weight = mixtures[i, c]
            if weight == 0:
                continue
            term = value[p] if weight == 1 else weight * value[p]
            total = term if total is None else total + term
        out.append(torch.zeros_like(rows[p], dtype=compute) if total is None else total)
    if not out:
        return rows.new_empty((0, *rows.shape[1:]))
    return torch.stack(out).to(x.dtype)


def coalition_fake_quantize_list(
    x: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero_point: Sequence[Tensor],
    quant_min: Sequence[Tensor],
    quant_max: Sequence[Tensor],
    mixtures: Sequence[Tensor],
    axis: int | None,
) -> list[Tensor]:
    """`coalition_fake_quantize` of several tensors; an empty `zero_point` list means 0 everywhere."""
    zeros = list(zero_point) or [None] * len(x)
    parts = zip(x, scale, zeros, quant_min, quant_max, mixtures, strict=True)
    return [coalition_fake_quantize(*part, axis, None) for part in parts]


def quantization_error(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: Tensor, quant_max: Tensor, axis: int | None
) -> Tensor:
    """Sum of (fake_quantize(x) - x)^2 for every candidate, [candidates], or [candidates, channels] with an axis."""
    errors = []
    for c in range(scale.shape[0]):
        zero = None if zero_point is None else zero_point[c]
        value, _, _ = _forward(x, scale[c], zero, None, None, int(quant_min[c]), int(quant_max[c]), axis, None)
        square = (value - x.to(value.dtype)).double().square()
        others = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
        errors.append(square.sum(others) if others else square)
    return torch.stack(errors).float() if errors else scale.new_empty(scale.shape)


ACTIVATIONS = (None, F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, F.hardswish)


def coalition_convolution(
    x: Tensor,
    padding: Tensor,
    weight: Tensor,
    start: Tensor,
    parent: Tensor,
    variant: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_row: Tensor | None,
    multiplies: bool,
    low: float,
    high: float,
    activation: int,
    geometry: Sequence[int],
    depthwise: bool,
    values: bool,
    child_row: Sequence[Tensor],
    child_grid: Sequence[Tensor],
    child_bits: Sequence[int],
) -> list[Tensor]:
    """Row i is the epilogue of start[i] + the convolution of x[parent[i]] with weight[variant[i]].

    x: [parents, samples, height, width, channels], uint8 (codes) or int16 (fixed point), channels a multiple of 4, or
    float32; padding [parents]: what stands for 0, as x; weight, int8 (g = 4), int16 (g = 2) or float32 (g = 1):
    [variants, blocks of 16 out, taps, channels of its group / g, 16, g], or, where depthwise, [variants, blocks of 16
    channels, taps, 16]; start: [rows, out up to a multiple of 16], int32, or float32; geometry: kernel, stride, padding
    before and after, and dilation, for height and width each. Sums of whole numbers fit into 32 bits. The rest:
    `coalition_epilogue`, but for find_nan.
    """
    kernel, stride, before, after, dilation = (list(geometry[i : i + 2]) for i in (0, 2, 4, 6, 8))
    if depthwise:
        kernels = weight.transpose(2, 3).reshape(weight.shape[0], -1, 1, *kernel)[:, : x.shape[-1]]
    else:
        depth = weight.shape[3] * weight.shape[5]
        kernels = weight.permute(0, 1, 4, 3, 5, 2).reshape(weight.shape[0], -1, depth, *kernel)
    out = []
    for row, (p, v) in enumerate(zip(parent.tolist(), variant.tolist(), strict=True)):
        image = x[p].permute(0, 3, 1, 2).double()
        image = torch.nn.functional.pad(image, (before[1], after[1], before[0], after[0]), value=float(padding[p]))
        groups = image.shape[1] // kernels.shape[2]
        product = torch.nn.functional.conv2d(image, kernels[v].double(), None, stride, 0, dilation, groups)
        product = product + start[row, : product.shape[1], None, None]
        out.append(product[:, : scale.shape[1]].permute(0, 2, 3, 1))
    if out:
        products = torch.stack(out)
    else:
        sizes = zip(x.shape[2:4], kernel, stride, before, after, dilation, strict=True)
        size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, p, q, d in sizes]
        products = scale.new_empty(0, x.shape[1], *size, scale.shape[1], dtype=torch.float64)
    rows = torch.arange(len(products), device=x.device)
    values_and_children = coalition_epilogue(
        *(products, rows, scale, bias, norm, eps, residual, residual_row, multiplies, low, high, activation),
        *(values, False, child_row, child_grid, child_bits),
    )
    return values_and_children[:2] + values_and_children[3:]


def coalition_epilogue(
    x: Tensor,
    parent: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    residual: Tensor | None,
    residual_row: Tensor | None,
    multiplies: bool,
    low: float,
    high: float,
    activation: int,
    values: bool,
    find_nan: bool,
    child_row: Sequence[Tensor],
    child_grid: Sequence[Tensor],
    child_bits: Sequence[int],
) -> list[Tensor]:
    """Row i is f(clamp(x[parent[i]] * scale[i] + bias[i] + residual[residual_row[i]], low, high)); then its codes.

    f is ACTIVATIONS[activation], up to rounding. x: float32 [parents, samples, height, width, channels]; scale, bias:
    [rows, channels]; residual as x, a factor where it `multiplies`. norm: the weight and bias of a normalization by
    each row's own mean and biased variance, float64 [2, channels], after scale and bias, eps added to the variance.
    child_row[k] [children]: the rows that list k descends from; child_bits[k]: what they become. 8: codes, uint8;
    child_grid[k] [children, 4] holds scale, zero point and bounds. 16 and 32: mixtures, int16, rounded, and float32;
    child_grid[k] [children, candidates, 5] holds the share of each candidate, too. Returns the rows (none unless
    `values`), their means and variances [rows, 2, channels] (none without norm), where x holds NaN, bool [rows,
    samples] (no rows unless `find_nan`), and each list [children, samples, height, width, channels], codes and int16
    with channels up to a multiple of 4, those beyond 0. NaN stays among floats, has the lowest code, and is -32767 in
    int16.
    """
    y = x[parent]
    broken = y.isnan().any((2, 3, 4)) if find_nan else y.new_empty((0, x.shape[1]), dtype=torch.bool)
    statistics = y.new_empty(0, 2, x.shape[-1], dtype=torch.float32)
    if norm is not None:
        if scale is None or bias is None:
            scale, bias = torch.ones(len(y), x.shape[-1]), torch.zeros(len(y), x.shape[-1])
        step, exact = scale.double(), y.double()
        mean = exact.mean((1, 2, 3))
        variance = (exact.square().mean((1, 2, 3)) - mean * mean).clamp(min=0) * step * step
        statistics = torch.stack([mean * step + bias, variance], 1).float()
        factor = norm[0] / (variance + eps).sqrt()
        scale, bias = (step * factor).float(), (norm[1] - mean * step * factor).float()
    y = y.float()
    if scale is not None and bias is not None:
        y = y * scale[:, None, None, None] + bias[:, None, None, None]
    if residual is not None and residual_row is not None:
        y = y * residual[residual_row] if multiplies else y + residual[residual_row]
    y = y.clamp(low, high)
    if (function := ACTIVATIONS[activation]) is not None:
        y = function(y)
    children = []
    for rows, grid, bits in zip(child_row, child_grid, child_bits, strict=True):
        if bits == 8:
            step, zero, least, most = (grid[:, k].reshape(-1, 1, 1, 1, 1) for k in range(4))
            code = torch.minimum(torch.maximum(raw_code(y[rows], step, None) + zero, least), most)
            child = torch.where(code.isnan(), least, code)
        else:
            child = torch.zeros_like(y[rows])
            for i, candidates in enumerate(grid):
                terms = [
                    share * _forward(y[rows[i]], s, z.int(), None, None, int(low), int(high), None, None)[0]
                    for s, z, low, high, share in candidates
                    if share != 0
                ]
                child[i] = sum(terms[1:], terms[0]) if terms else 0.0
            if bits == 16:
                child = torch.where(child.isnan(), -32767, child.clamp(-32767, 32767)).round()
        if bits < 32:
            child = torch.nn.functional.pad(child, (0, -y.shape[-1] % 4))
        children.append(child.to({8: torch.uint8, 16: torch.int16, 32: torch.float32}[bits]))
    return [y if values else y[:0], statistics, broken, *children]


def coalition_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_row: Tensor,
    k_row: Tensor,
    v_row: Tensor,
    samples: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """Row i is softmax(scale * q k^T) v of row q_row[i] of q, k_row[i] of k and v_row[i] of v, up to rounding.

    q, k, v: float32 [its rows * samples, heads, tokens, size], v with the tokens of k. causal: query t sees keys up to
    t. Returns [rows * samples, heads, queries, size of v], queries before heads in memory.
    """
    taken = [x.unflatten(0, (-1, samples))[row].flatten(0, 1) for x, row in ((q, q_row), (k, k_row), (v, v_row))]
    scores = scale * taken[0] @ taken[1].transpose(2, 3)
    if causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ taken[2]).transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: Tensor | None,
    quant_max: Tensor | None,
    bound_min: int,
    bound_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, raw code and clamped code, in float32 (float64 for float64), with groups split off."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_ = grouped(x, axis, group_size).to(compute)
    s = broadcast(scale, x, axis, group_size).to(compute)
    z = None if zero_point is None else broadcast(zero_point, x, axis, group_size)
    low = bound_min if quant_min is None else broadcast(quant_min, x, axis, group_size).to(compute)
    high = bound_max if quant_max is None else broadcast(quant_max, x, axis, group_size).to(compute)
    raw = raw_code(x_, s, z)
    code = (
        torch.clamp(raw, low, high)
        if isinstance(low, int) == isinstance(high, int)
        else raw.clamp(min=low).clamp(max=high)
    )
    if z is None:
        return code * s, raw, code
    if not z.is_floating_point():
        return (code - z.to(compute)) * s, raw, code
    # With a zero point that is not a small dyadic number torch's product is a double's; else both are the same.
    return ((code.double() - z.double()) * s.double()).to(compute), raw, code
