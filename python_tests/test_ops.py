"""The kernels against their plain-torch twins and against torch's own ops, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import smpq_ext
from smpq_ext import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-38,
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    65504.0,
    3e38,
    -3e38,
    math.inf,
    -math.inf,
    math.nan,
]
# Numbers that a failing example replays.
GENERATORS = st.integers(0, 10**6).map(lambda seed: torch.Generator().manual_seed(seed))


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that every NaN is the same."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = torch.int64 if a.dtype == torch.float64 else torch.int32 if a.dtype == torch.float32 else torch.int16
    same = a.contiguous().view(kind) == b.contiguous().view(kind)
    return bool((same | (a.isnan() & b.isnan())).all())


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, special: bool = True) -> Tensor:
    """Odd shapes, any strides: contiguous, transposed, channels-last, sliced, expanded, empty."""
    shape = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] *= draw(st.sampled_from([1, 9, 70, 1100]))
    generator = draw(GENERATORS)
    x = torch.randn(shape, generator=generator) * 10 ** draw(st.integers(-3, 3))
    if special and x.numel():
        where = torch.randint(0, x.numel(), (8,), generator=generator)
        x.view(-1)[where] = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (8,), generator=generator)]
    x = x.to(draw(st.sampled_from(dtypes)))
    form = draw(st.sampled_from(["plain", "transposed", "channels_last", "sliced", "expanded"]))
    if form == "transposed":
        x = x.transpose(0, -1)
    elif form == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "sliced":
        x = x[..., ::2]
    elif form == "expanded":
        x = x.unsqueeze(0).expand(3, *x.shape)
    return x


@st.composite
def grids(draw: st.DrawFn, count: int | None) -> tuple[Tensor, Tensor | None, int, int]:
    """Scale and zero point [count] (or []), and bounds of 1 to 16 bits."""
    generator = draw(GENERATORS)
    size = [] if count is None else [count]
    scale = torch.rand(size, generator=generator) * 10 ** draw(st.integers(-4, 2)) + 1e-6
    bits, signed = draw(st.integers(1, 16)), draw(st.booleans())
    low, high = ops.bounds(bits, signed)
    kind = draw(st.sampled_from(["none", "integer", "whole", "fraction"]))
    if kind == "none":
        return scale, None, low, high
    zero = torch.randint(low, high + 1, size, generator=generator, dtype=torch.int32)
    if kind == "integer":
        return scale, zero, low, high
    return scale, zero.float() + (torch.rand(size, generator=generator) if kind == "fraction" else 0), low, high


def torch_says(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int, axis: int | None) -> Tensor:
    """torch's own op, per channel (along a new axis where the grid is per tensor)."""
    zero = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero
    if axis is not None:
        return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, low, high)
    flat = torch.fake_quantize_per_channel_affine(x.reshape(1, -1), scale.reshape(1), zero.reshape(1), 0, low, high)
    return flat.view(x.shape)


@given(data=st.data())
def test_fake_quantize_is_torch_where_torch_is_defined(device: str, data: st.DataObject) -> None:
    x = data.draw(tensors())
    axis = data.draw(st.one_of(st.none(), st.integers(0, x.dim() - 1)))
    scale, zero, low, high = data.draw(grids(None if axis is None else x.shape[axis]))
    inverse = 1 / scale if axis is None else reference.broadcast(1 / scale, x, axis, None)
    defined = x.isfinite() & ((x.float() * inverse).abs() < 2.0**31)  # beyond, torch's conversion to integers is not
    kept = torch.where(defined, x, torch.zeros_like(x))
    assume(scale.numel())  # torch's op refuses an empty scale
    ours = smpq_ext.fake_quantize(
        kept.to(device),
        scale.to(device),
        None if zero is None else zero.to(device),
        quant_min=low,
        quant_max=high,
        axis=axis,
    )
    assert bits_equal(ours.cpu(), torch_says(kept, scale, zero, low, high, axis))


@given(data=st.data())
def test_fake_quantize_is_its_reference(device: str, data: st.DataObject) -> None:
    x = data.draw(tensors([*DTYPES, torch.float64]))
    axis = data.draw(st.one_of(st.none(), st.integers(-x.dim(), x.dim() - 1)))
    count = None if axis is None else x.shape[axis]
    scale, zero, low, high = data.draw(grids(count))
    if x.dtype == torch.float64:
        scale, zero = scale.double(), zero.double() if zero is not None and zero.is_floating_point() else zero
    args = [scale, zero, None, None, low, high, axis, None]
    if count is not None and data.draw(st.booleans()):  # a width of its own for every channel
        bits = torch.randint(1, 17, (count,), generator=data.draw(GENERATORS), dtype=torch.int32)
        args[2:6] = [*ops.bounds(bits), 0, 0]
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    ours = ops._smpq.fake_quantize(x.to(device), *there)
    assert bits_equal(ours.cpu(), reference.fake_quantize(x, *args))
    assert ours.stride() == torch.empty_like(x).stride()


@given(data=st.data())
def test_groups_are_channels_of_a_reshaped_tensor(device: str, data: st.DataObject) -> None:
    rows, count, size = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 2, 8, 33, 128])))
    x = torch.randn(rows, count * size, generator=data.draw(GENERATORS))
    scale, zero, low, high = data.draw(grids(rows * count))
    shape = (rows, count)
    ours = smpq_ext.fake_quantize(
        x.to(device),
        scale.view(shape).to(device),
        None if zero is None else zero.view(shape).to(device),
        quant_min=low,
        quant_max=high,
        group_size=size,
    )
    expected = reference.fake_quantize(x.view(rows * count, size), scale, zero, None, None, low, high, 0, None)
    assert bits_equal(ours.cpu(), expected.view(rows, -1))


def test_not_a_number_stays_and_infinity_saturates(device: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38], device=device)
    y = smpq_ext.fake_quantize(x, 0.5, bits=3).cpu()
    assert y[0].isnan()
    assert y[1:].tolist() == [1.5, -2.0, 1.5, -2.0]


def test_one_bit_is_plus_or_minus_the_scale(device: str) -> None:
    x = torch.tensor([-7.0, -0.1, 0.0, 0.1, 7.0], device=device)
    assert smpq_ext.fake_quantize(x, 0.25, bits=1).tolist() == [-0.25, -0.25, 0.25, 0.25, 0.25]
    scale = torch.tensor([0.25, 0.5], device=device)
    mixed = smpq_ext.fake_quantize(x.expand(2, 5), scale, bits=torch.tensor([1, 2], device=device), axis=0)
    assert mixed.tolist() == [[-0.25, -0.25, 0.25, 0.25, 0.25], [-1.0, 0.0, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39])
def test_a_tiny_scale_maps_zero_to_zero(device: str, scale: float) -> None:
    y = smpq_ext.fake_quantize(torch.zeros(5, device=device), scale, bits=4)
    assert bits_equal(y.cpu(), torch.zeros(5))


@given(data=st.data())
def test_rounding_is_half_to_even_and_idempotent(device: str, data: st.DataObject) -> None:
    bits = data.draw(st.integers(2, 16))
    low, high = ops.bounds(bits)
    step = 2.0 ** data.draw(st.integers(-10, 10))
    ties = (torch.arange(max(low, -500), min(high, 500), dtype=torch.float32) + 0.5) * step
    y = smpq_ext.fake_quantize(ties.to(device), step, bits=bits)
    assert ((y.cpu() / step) % 2 == 0).logical_or(y.cpu() == high * step).all()
    assert bits_equal(smpq_ext.fake_quantize(y, step, bits=bits).cpu(), y.cpu())


@given(data=st.data())
def test_gradients_are_those_of_the_reference(device: str, data: st.DataObject) -> None:
    x = data.draw(tensors(special=False))
    axis = data.draw(st.one_of(st.none(), st.integers(0, x.dim() - 1)))
    scale, zero, low, high = data.draw(grids(None if axis is None else x.shape[axis]))
    grad = torch.randn(x.shape, generator=data.draw(GENERATORS)).to(x.dtype)
    args = (scale, zero, None, None, low, high, axis, None, True)
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    ours = ops._smpq.fake_quantize_backward(grad.to(device), x.to(device), *there)
    expected = reference.fake_quantize_backward(grad, x, *args)
    assert bits_equal(ours[0].cpu(), expected[0])
    magnitude = reference.fake_quantize_backward(grad.abs(), x, *args)
    for mine, theirs, size in zip(ours[1:], expected[1:], magnitude[1:], strict=True):
        # Sums in another order: up to rounding of their largest term, whose sign the magnitude bounds only roughly.
        limit = 1e-4 * (size.abs() + theirs.abs()).max().item() + 1e-4 if theirs.numel() else 0
        assert torch.allclose(mine.cpu(), theirs, rtol=1e-3, atol=limit)


@given(data=st.data())
def test_gradient_of_x_is_torchs(device: str, data: st.DataObject) -> None:
    x = data.draw(tensors(special=False)).float()
    scale, zero, low, high = data.draw(grids(x.shape[0]))
    assume(scale.numel())
    grad = torch.randn(x.shape, generator=data.draw(GENERATORS))
    theirs = x.clone().requires_grad_()
    torch_says(theirs, scale, zero, low, high, 0).backward(grad)
    args = (scale, zero, None, None, low, high, 0, None, False)
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    assert bits_equal(ops._smpq.fake_quantize_backward(grad.to(device), x.to(device), *there)[0].cpu(), theirs.grad)


@st.composite
def coalitions(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Arguments of coalition_fake_quantize, as the op takes them."""
    has_parent = draw(st.booleans())
    x = draw(tensors([*DTYPES, torch.float64]))
    if has_parent and x.dim() == 1:
        x = x.unsqueeze(0)
    rows = draw(st.integers(0, 6)) if not has_parent or x.shape[0] else 0
    row_shape = x.shape[1:] if has_parent else x.shape
    axis = draw(st.one_of(st.none(), st.integers(-len(row_shape), len(row_shape) - 1))) if row_shape else None
    candidates = draw(st.integers(1, 7))
    generator = draw(GENERATORS)
    shape = [candidates] if axis is None else [candidates, row_shape[axis]]
    scale = torch.rand(shape, generator=generator) + 0.01
    low, high = ops.bounds(torch.randint(1, 17, (candidates,), generator=generator, dtype=torch.int32))
    kind = draw(st.sampled_from(["none", "integer", "whole", "fraction"]))
    zero: Tensor | None = torch.randint(-3, 4, shape, generator=generator, dtype=torch.int32)
    if kind in ("whole", "fraction"):
        zero = zero.float() + (0.3 if kind == "fraction" else 0.0)
    mixtures = torch.rand(rows, candidates, generator=generator)
    mixtures[mixtures < draw(st.sampled_from([0.0, 0.5, 1.1]))] = 0
    for row in mixtures:
        if draw(st.booleans()):
            row.zero_()[draw(st.integers(0, candidates - 1))] = 1
    parent = torch.randint(0, max(x.shape[0], 1), (rows,), generator=generator) if has_parent else None
    if x.dtype == torch.float64:
        scale, mixtures = scale.double(), mixtures.double()
        zero = zero.double() if zero.is_floating_point() else zero
    return x, scale, None if kind == "none" else zero, low, high, mixtures, axis, parent


@given(args=coalitions())
def test_coalition_fake_quantize_is_its_reference(device: str, args: tuple[Tensor, ...]) -> None:
    there = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    ours = ops._smpq.coalition_fake_quantize(*there)
    assert bits_equal(ours.cpu(), reference.coalition_fake_quantize(*args))


@given(args=coalitions())
def test_a_one_hot_row_is_fake_quantize(device: str, args: tuple[Tensor, ...]) -> None:
    x, scale, zero, low, high, _, axis, _ = (a.to(device) if isinstance(a, Tensor) else a for a in args)
    eye = torch.eye(len(scale), dtype=scale.dtype, device=device)
    rows = (
        ops._smpq.coalition_fake_quantize(
            x, scale, zero, low, high, eye, None if axis is None else axis % x.dim(), None
        )
        if (axis is None or scale.shape[1] == x.shape[axis % x.dim()])
        else None
    )
    if rows is None:
        return
    for c in range(len(scale)):
        one = ops._smpq.fake_quantize(
            x,
            scale[c],
            None if zero is None else zero[c],
            None,
            None,
            int(low[c]),
            int(high[c]),
            None if axis is None else axis % x.dim(),
            None,
        )
        assert bits_equal(rows[c].cpu(), one.cpu())


def test_a_list_is_its_tensors_one_by_one(device: str) -> None:
    shapes = [(16, 3, 3, 3), (32, 16), (5,), (0, 4), (300, 7, 3), (64, 1, 3, 3)]
    x = [torch.randn(s, device=device) for s in shapes]
    scale = [torch.rand(5, s[0], device=device) + 0.01 for s in shapes]
    low, high = ops.bounds(torch.tensor([2, 3, 4, 6, 8], dtype=torch.int32, device=device))
    mixtures = [torch.rand(k, 5, device=device) for k in (1, 3, 2, 4, 0, 6)]
    for zero in ([], [torch.randn_like(s) for s in scale]):
        together = ops._smpq.coalition_fake_quantize_list(x, scale, zero, [low] * 6, [high] * 6, mixtures, 0)
        for k in range(6):
            z = zero[k] if zero else None
            alone = reference.coalition_fake_quantize(
                *(None if t is None else t.cpu() for t in (x[k], scale[k], z, low, high, mixtures[k])), 0, None
            )
            assert bits_equal(together[k].cpu(), alone)
    assert smpq_ext.coalition_fake_quantize_list([], [], [], [], [], []) == []


@given(args=coalitions())
def test_quantization_error_is_its_reference(device: str, args: tuple[Tensor, ...]) -> None:
    x, scale, zero, low, high, _, axis, _ = args
    if axis is not None and scale.shape[1] != x.shape[axis % x.dim()]:
        axis, scale = None, scale[:, 0] if scale.shape[1] else scale.new_ones(len(scale))
        zero = None
    x = torch.where(x.isfinite(), x, torch.zeros_like(x)).clamp(-1e4, 1e4)
    there = [a.to(device) if isinstance(a, Tensor) else a for a in (x, scale, zero, low, high, axis)]
    ours = ops._smpq.quantization_error(*there)
    expected = reference.quantization_error(x, scale, zero, low, high, axis)
    assert ours.shape == scale.shape and ours.dtype == torch.float32
    assert torch.allclose(ours.cpu(), expected, rtol=1e-5, atol=1e-30)


def test_results_do_not_depend_on_threads(device: str) -> None:
    x = torch.randn(3, 70000, device=device)
    scale = torch.rand(4, 3, device=device) + 0.01
    low, high = ops.bounds(torch.tensor([2, 3, 4, 8], dtype=torch.int32, device=device))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(ops._smpq.quantization_error(x, scale, None, low, high, 0))
    assert torch.equal(*found)


def test_what_does_not_fit_is_said(device: str) -> None:
    x = torch.randn(4, 6, device=device)
    scale = torch.ones(6, device=device)
    low, high = ops.bounds(torch.tensor([2, 4], dtype=torch.int32, device=device))
    cases = {
        "name the axis": lambda: smpq_ext.fake_quantize(x, scale, bits=4),
        "has 4 channels along axis 0": lambda: smpq_ext.fake_quantize(x, scale, bits=4, axis=0),
        "axis 2 is not a dimension": lambda: smpq_ext.fake_quantize(x, scale, bits=4, axis=2),
        "group_size 4 does not divide": lambda: smpq_ext.fake_quantize(x, scale, bits=4, group_size=4),
        "is larger than quant_max": lambda: smpq_ext.fake_quantize(x, 1.0, quant_min=3, quant_max=2),
        "x must be float32": lambda: smpq_ext.fake_quantize(x.int(), 1.0, bits=4),
        "a weight for each candidate": lambda: smpq_ext.coalition_fake_quantize(
            x, scale[:2], None, low, high, torch.ones(3, 3, device=device)
        ),
        "as many entries as x": lambda: smpq_ext.coalition_fake_quantize_list([x], [], [], [low], [high], [scale]),
    }
    for message, call in cases.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="either bits"):
        smpq_ext.fake_quantize(x, 1.0, bits=4, quant_min=0, quant_max=1)
    with pytest.raises(ValueError, match="at most 16 bits"):
        smpq_ext.fake_quantize(x, 1.0, quant_min=0, quant_max=1 << 17)
    for bits in (17, 0, 4.0, torch.tensor([4, 4, 0, 40]), torch.ones(4)):
        with pytest.raises(ValueError, match=r"from 1 to 16|of integers"):
            smpq_ext.fake_quantize(x, torch.ones(4), bits=bits, axis=0)
    with pytest.raises(RuntimeError, match="entry 1 does not"):
        ops._smpq.coalition_fake_quantize_list(
            [x, x],
            [scale[:2], scale[:2].double()],
            [],
            [low] * 2,
            [high] * 2,
            [torch.ones(1, 2, device=device)] * 2,
            None,
        )


def test_a_parent_that_is_not_there_is_refused_on_the_cpu() -> None:
    low, high = ops.bounds(torch.tensor([2], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"parent\[1\] is 5"):
        torch.ops.smpq.coalition_fake_quantize(
            torch.ones(2, 3), torch.ones(1), None, low, high, torch.ones(2, 1), None, torch.tensor([0, 5])
        )


def test_what_is_no_tensor_is_named() -> None:
    x, one = torch.zeros(3), torch.ones(1)
    bounds = torch.ones(1, dtype=torch.int32)
    with pytest.raises(TypeError, match="fake_quantize: x must be a tensor, not a ndarray"):
        smpq_ext.fake_quantize(x.numpy(), 1.0, bits=2)
    with pytest.raises(TypeError, match="coalition_fake_quantize: quant_min must be a tensor, not a list"):
        smpq_ext.coalition_fake_quantize(x, one, None, [0], bounds, one[None])
    with pytest.raises(TypeError, match="quantization_error: scale must be a tensor, not a float"):
        smpq_ext.quantization_error(x, 1.0, None, bounds, bounds, axis=None)
