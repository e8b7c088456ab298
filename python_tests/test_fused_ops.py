"""coalition_convolution and coalition_epilogue against their plain-torch twins, bit for bit but for activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smpq_ext import ops, reference
from smpq_ext.engine.fusion import is_depthwise, pack

pytestmark = pytest.mark.usefixtures("compiled")


def on(device: str, given: Any) -> Any:
    """Arguments with their tensors on the device."""
    if isinstance(given, list | tuple):
        return type(given)(on(device, x) for x in given)
    return given.to(device) if isinstance(given, Tensor) else given


def children(rows: int, generator: torch.Generator, lists: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Rows, grids and kinds of children: codes and mixtures, several lists, rows in any order, zero points inside."""
    row, grid, bits = [], [], []
    for k in range(lists):
        n = 3 * k if rows else 0
        size = (n,) if k % 3 == 0 else (n, 3)
        high = 2 ** torch.randint(1, 9, size, generator=generator) - 1
        zero = (torch.rand(size, generator=generator) * (high + 1)).floor()
        scale = torch.rand(size, generator=generator) + 0.01
        fields = [scale, zero, torch.zeros(size), high.float()]
        if k % 3:
            share = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < 0.7)
            fields.append(share * (100 if k % 3 == 1 else 1))
        row.append(torch.randint(0, max(rows, 1), (n,), generator=generator))
        grid.append(torch.stack(fields, -1))
        bits.append((8, 16, 32)[k % 3])
    return row, grid, bits


KINDS = [
    (torch.uint8, 4, (0, 256), (-128, 128)),
    (torch.int16, 2, (-4000, 4001), (-300, 301)),
    (torch.float32, 1, (-50, 50), (-50, 50)),
]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of coalition_convolution: odd sizes, strides, dilations, depthwise, with and without a residual."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def integers(low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=dtype)

    kind, together, input_range, weight_range = draw(st.sampled_from(KINDS))
    depthwise = draw(st.booleans())
    parents, rows, variants, samples = (draw(st.integers(low, 3)) for low in (1, 0, 1, 1))
    channels = draw(st.sampled_from([1, 3, 4, 16, 20, 33]))
    outs, groups = channels if depthwise else draw(st.sampled_from([1, 5, 16, 32, 50, 64, 80])), 1
    if depthwise:
        groups = channels
    elif draw(st.booleans()):
        groups, channels, outs = draw(st.sampled_from([(2, 8, 64), (3, 24, 6), (4, 16, 16), (8, 32, 64), (2, 6, 192)]))
    kernel, stride, before, after = ([draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 0))
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    height, width = (draw(st.integers(d * (k - 1) + 1, 12)) for d, k in zip(dilation, kernel, strict=True))
    padded = -(-channels // 4) * 4 if together > 1 else channels
    normalized = draw(st.booleans())
    if normalized and kind == torch.int16:  # the statistics are those of products in float32: whole ones up to 2^24
        input_range = (-125, 126)
    x = integers(*input_range, parents, samples, height, width, padded).to(kind)
    x[..., channels:] = 0
    weight = integers(*weight_range, variants, outs, channels // groups, *kernel)
    weight = weight.to({torch.uint8: torch.int8}.get(kind, kind))
    sizes = zip((height, width), kernel, stride, before, after, dilation, strict=True)
    size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, p, q, d in sizes]
    residual = residual_row = None
    if draw(st.booleans()):
        residual = 100 * torch.randn(2, samples, *size, outs, generator=generator)
        residual_row = integers(0, 2, rows)
    norm = torch.randn(2, outs, generator=generator).double() if normalized else None
    return (
        x,
        integers(*input_range, parents).to(kind),
        pack(weight, groups, together),
        integers(-1000, 1000, rows, -(-outs // 16) * 16).to(torch.float32 if together == 1 else torch.int32),
        integers(0, parents, rows),
        integers(0, variants, rows),
        torch.rand(rows, outs, generator=generator) * 1e-2,
        torch.randn(rows, outs, generator=generator),
        *(norm, 1e-5, residual, residual_row, draw(st.booleans())),
        *(*draw(st.sampled_from([(0.0, 6.0), (-1e30, 1e30), (0.0, 3.4e38)])), 0),
        [*kernel, *stride, *before, *after, *dilation],
        *(is_depthwise(weight[0], groups), draw(st.booleans())),
        *children(rows, generator, draw(st.integers(0, 4))),
    )


def is_twin(op: str, device: str, arguments: tuple[Any, ...]) -> None:
    ours, theirs = getattr(ops._smpq, op)(*on(device, arguments)), getattr(reference, op)(*arguments)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@given(arguments=convolutions())
def test_convolutions_are_their_twin_bit_for_bit(device: str, arguments: tuple[Any, ...]) -> None:
    is_twin("coalition_convolution", device, arguments)


@st.composite
def epilogues(draw: st.DrawFn) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parents, rows, channels = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.sampled_from([1, 3, 4, 16, 35]))
    size = [draw(st.integers(1, 3)), draw(st.integers(1, 17)), draw(st.integers(1, 17))]
    x = 10 * torch.randn(parents, *size, channels, generator=generator)
    affine, normalized = draw(st.booleans()), draw(st.booleans())
    if normalized:
        x = (x * 1024).round() / 1024  # their sums are exact in any order
    extremes = [0.0, torch.inf, -torch.inf, torch.nan, *([] if normalized else [1e38, -1e38])]
    x.view(-1)[0] = draw(st.sampled_from(extremes))
    residual = torch.randn(2, *size, channels, generator=generator) if draw(st.booleans()) else None
    return (
        x,
        torch.randint(0, parents, (rows,), generator=generator),
        torch.randn(rows, channels, generator=generator) if affine else None,
        torch.randn(rows, channels, generator=generator) if affine else None,
        torch.randn(2, channels, generator=generator).double() if normalized else None,
        *(1e-5, residual),
        None if residual is None else torch.randint(0, 2, (rows,), generator=generator),
        *(draw(st.booleans()), draw(st.sampled_from([-1e30, 0.0])), 1e30, 0, draw(st.booleans()), draw(st.booleans())),
        *children(rows, generator, draw(st.integers(0, 4))),
    )


@given(arguments=epilogues())
def test_epilogues_are_their_twin_bit_for_bit(device: str, arguments: tuple[Any, ...]) -> None:
    is_twin("coalition_epilogue", device, arguments)


@pytest.mark.parametrize("activation", range(1, len(reference.ACTIVATIONS)))
@given(data=st.data())
def test_activations_are_those_of_torch_and_children_those_of_the_values(
    device: str, activation: int, data: st.DataObject
) -> None:
    given_ = list(data.draw(convolutions() if data.draw(st.booleans()) else epilogues()))
    convolution = len(given_) == 22
    op = "coalition_convolution" if convolution else "coalition_epilogue"
    given_[15 if convolution else 11], given_[18 if convolution else 12] = activation, True
    ours, theirs = getattr(ops._smpq, op)(*on(device, tuple(given_))), getattr(reference, op)(*given_)
    values, expected = ours[0].cpu(), theirs[0]
    # 1 + erf or 1 + tanh cancel where x is far below 0, in torch as here.
    before = given_.copy()
    before[15 if convolution else 11] = 0
    x = getattr(reference, op)(*before)[0]
    assert ((values - expected).abs() <= 5e-7 * x.abs().clamp(min=1e-3))[expected.isfinite()].all()
    rows = torch.arange(len(values))
    plain = None, None, None, 0.0, None, None, False, -torch.inf, torch.inf, 0, True, False
    again = reference.coalition_epilogue(values, rows, *plain, *given_[-3:])
    for a, b in zip(ours[2 if convolution else 3 :], again[3:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", range(1, len(reference.ACTIVATIONS)))
def test_activations_err_little_everywhere(device: str, activation: int) -> None:
    x = torch.cat([torch.linspace(-30, 30, 1 << 16), 10 ** torch.linspace(-30, 30, 1 << 12), torch.tensor([torch.inf])])
    x = torch.cat([x, -x[:-1]]).view(1, 1, 1, -1, 1).expand(-1, -1, -1, -1, 16).contiguous()
    settings = None, None, None, 0.0, None, None, False, -torch.inf, torch.inf, activation, True, False
    ours = ops._smpq.coalition_epilogue(
        x.to(device), torch.zeros(1, dtype=torch.int64, device=device), *settings, [], [], []
    )
    exact = reference.ACTIVATIONS[activation](x.double())
    assert torch.equal(ours[0].isinf().cpu(), exact.isinf())
    error = (ours[0].cpu().double() - exact).abs() / x.double().abs().clamp(min=1e-3)
    assert error[exact.isfinite()].max() < 5e-7


def test_products_of_floats_have_the_accuracy_of_float32(device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, *size, generator=generator) for n, size in ((2, (3, 6, 6, 33)), (2, (40, 33, 3, 3))))
    arguments = (
        *(x, torch.zeros(2), pack(weight, 1, 1), torch.zeros(2, 48), torch.arange(2), torch.arange(2)),
        *(torch.ones(2, 40), torch.zeros(2, 40), None, 0.0, None, None, False, -torch.inf, torch.inf, 0),
        *([3, 3, 1, 1, 1, 1, 1, 1, 1, 1], False, True, [], [], []),
    )
    ours = ops._smpq.coalition_convolution(*on(device, arguments))[0].cpu().double()
    exact = reference.coalition_convolution(*on("cpu", arguments))[0].double()
    sizes = list(arguments)
    sizes[0], sizes[2] = x.abs(), pack(weight.abs(), 1, 1)
    error = (ours - exact).abs() / reference.coalition_convolution(*sizes)[0]
    assert error.max() < 1e-6  # of the sum of the products' sizes; eleven bits would give 1e-4


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_no_nan_becomes_a_number(device: str, bits: int) -> None:
    x = torch.ones(1, 2, 1, 1, 16)
    x[0, 1, 0, 0, 3] = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    arguments = (
        *(x, torch.zeros(1), pack(torch.ones(1, 5, 16, 1, 1), 1, 1), torch.zeros(1, 16), torch.zeros(1).long()),
        *(torch.zeros(1).long(), torch.ones(1, 5), torch.zeros(1, 5), None, 0.0, None, None, False),
        *(-torch.inf, torch.inf, 0, [1, 1, 1, 1, 0, 0, 0, 0, 1, 1], False, True, [], [], []),
    )
    out = ops._smpq.coalition_convolution(*on(device, arguments))[0].cpu()
    assert (out[0, 0] == 16).all() and out[0, 1].isnan().all()


def example() -> list[Any]:
    """Plain arguments of coalition_convolution."""
    rows, grids = torch.tensor([1, 0]), torch.tensor([[0.1, 0, 0, 15], [0.2, 3, 0, 255]])
    return [
        torch.randint(0, 16, (2, 3, 5, 5, 4), dtype=torch.uint8),
        torch.zeros(2, dtype=torch.uint8),
        pack(torch.randint(-7, 8, (2, 6, 4, 3, 3)).to(torch.int8), 1, 4),
        torch.zeros(2, 16, dtype=torch.int32),
        *(torch.tensor([0, 1]), torch.tensor([1, 1])),
        *(torch.rand(2, 6), torch.rand(2, 6), torch.rand(2, 6).double(), 1e-5, None, None, False, 0.0, 6.0, 0),
        *([3, 3, 1, 1, 1, 1, 1, 1, 1, 1], False, True, [rows], [grids], [8]),
    ]


def test_any_number_of_layers_reads_a_value(device: str) -> None:
    x, rows = torch.randn(3, 2, 4, 4, 5), torch.arange(3)
    grids = torch.tensor([[0.1, 3, 0, 15], [0.2, 0, 0, 255]])
    lists = [[torch.randint(0, 3, (2,)) for _ in range(70)], [grids] * 70, [8] * 70]
    arguments = (x, rows, None, None, None, 0.0, None, None, False, 0.0, 6.0, 0, True, False, *lists)
    ours = ops._smpq.coalition_epilogue(*on(device, arguments))
    for a, b in zip(ours, reference.coalition_epilogue(*arguments), strict=True):
        assert torch.equal(a.cpu(), b)


def test_opcheck_on_the_cpu(opcheck: Any) -> None:
    opcheck(torch.ops.smpq.coalition_convolution.default, tuple(example()))
    x = torch.randn(2, 3, 5, 5, 6)
    rows, grids, _ = example()[-3:]
    mixed = [torch.rand(2, 3, 5).ceil()]
    for bits, grid in ((8, grids), (16, mixed), (32, mixed)):
        settings = None, None, None, 0.0, None, None, False, 0.0, 6.0, 0, True, True
        arguments = (x, torch.tensor([1, 0, 0]), *settings, rows, grid, [bits])
        opcheck(torch.ops.smpq.coalition_epilogue.default, arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 5, 5, 3, dtype=torch.uint8), "no multiple of 4"),
        (0, torch.zeros(2, 3, 5, 5, 4), "weight"),
        (1, torch.zeros(3, dtype=torch.uint8), "padding"),
        (2, torch.zeros(2, 1, 4, 1, 16, 4, dtype=torch.int8), "weight"),
        (3, torch.zeros(2, 6, dtype=torch.int32), "start"),
        (4, torch.tensor([0, 2]), r"parent\[1\] is 2"),
        (5, torch.tensor([-1, 0]), r"variant\[0\] is -1"),
        (6, torch.rand(2, 17), "blocks of 16"),
        (8, torch.zeros(2, 6), "norm"),
        (10, torch.zeros(1, 3, 5, 5, 6), "residual"),
        (16, [9, 9, 1, 1, 0, 0, 0, 0, 1, 1], "weight"),
        (16, [3, 3, 1, 1], "geometry"),
        (16, [3, 3, 2, 2, 0, 0, 0, 0, 3, 3], "larger than the padded x"),
        (15, 5, "activation must be from 0 to 4, not 5"),
        (19, [torch.tensor([0, 5])], r"child_row\[1\] is 5"),
        (20, [torch.tensor([[0.1, 0, 0]])], "child_grid"),
        (21, [7], "child_bits"),
        (21, [8, 8], "as many entries"),
        (20, [torch.tensor([[0.1, 0, 0, 300], [0.1, 0, 0, 1]])], "0 to 255"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_on_the_cpu(position: int, value: Any, message: str) -> None:
    arguments = example()
    torch.ops.smpq.coalition_convolution(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.smpq.coalition_convolution(*arguments)


def test_no_channels_and_other_channels_are_refused_on_the_cpu() -> None:
    arguments = example()
    arguments[6] = arguments[7] = torch.rand(2, 0)
    arguments[2], arguments[3] = torch.zeros(2, 0, 9, 1, 16, 4, dtype=torch.int8), torch.zeros(2, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="there are no channels"):
        torch.ops.smpq.coalition_convolution(*arguments)
    arguments = example()
    arguments[2], arguments[17] = torch.zeros(2, 1, 9, 16, dtype=torch.int8), True
    with pytest.raises(RuntimeError, match="depthwise layer needs 8"):
        torch.ops.smpq.coalition_convolution(*arguments)
