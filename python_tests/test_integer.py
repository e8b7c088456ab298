"""The integer path: its ops against their plain-torch twins bit for bit, and its values against the floating path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_models import Branches
from torch import Tensor, nn

import smpq_ext
from smpq_ext import reference
from smpq_ext.engine.integer import _pack, _pack_depthwise

pytestmark = pytest.mark.usefixtures("compiled")


def children(rows: int, generator: torch.Generator, lists: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rows and grids of codes: several lists, rows in any order, widths of 1 to 8 bits, zero points inside."""
    row, grid = [], []
    for k in range(lists):
        n = 3 * k if rows else 0
        high = 2 ** torch.randint(1, 9, (n,), generator=generator) - 1
        zero = (torch.rand(n, generator=generator) * (high + 1)).floor()
        scale = torch.rand(n, generator=generator) + 0.01
        row.append(torch.randint(0, max(rows, 1), (n,), generator=generator))
        grid.append(torch.stack([scale, zero, torch.zeros(n), high.float()], 1))
    return row, grid


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of coalition_convolution: odd sizes, strides, dilations, depthwise, with and without a residual."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def integers(low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=dtype)

    depthwise = draw(st.booleans())
    parents, rows, variants, samples = (draw(st.integers(low, 3)) for low in (1, 0, 1, 1))
    channels = draw(st.sampled_from([1, 3, 4, 16, 20, 33]))
    outs = channels if depthwise else draw(st.sampled_from([1, 5, 16, 32, 50, 64, 80]))
    kernel, stride, before, after = ([draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 0))
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    height, width = (draw(st.integers(d * (k - 1) + 1, 12)) for d, k in zip(dilation, kernel, strict=True))
    padded = -(-channels // 4) * 4
    codes = integers(0, 256, parents, samples, height, width, padded, dtype=torch.uint8)
    codes[..., channels:] = 0
    weight = integers(-128, 128, variants, outs, 1 if depthwise else channels, *kernel)
    sizes = zip((height, width), kernel, stride, before, after, dilation, strict=True)
    size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, p, q, d in sizes]
    residual = residual_row = None
    if draw(st.booleans()):
        residual = 100 * torch.randn(2, samples, *size, outs, generator=generator)
        residual_row = integers(0, 2, rows)
    norm = torch.randn(2, outs, generator=generator).double() if draw(st.booleans()) else None
    return (
        codes,
        integers(0, 256, parents, dtype=torch.uint8),
        (_pack_depthwise if depthwise else _pack)(weight),
        integers(-1000, 1000, rows, -(-outs // 16) * 16, dtype=torch.int32),
        integers(0, parents, rows),
        integers(0, variants, rows),
        torch.rand(rows, outs, generator=generator) * 1e-2,
        torch.randn(rows, outs, generator=generator),
        *(norm, 1e-5, residual, residual_row),
        *draw(st.sampled_from([(0.0, 6.0), (-1e30, 1e30), (0.0, 3.4e38)])),
        [*kernel, *stride, *before, *after, *dilation],
        *(depthwise, draw(st.booleans())),
        *children(rows, generator, draw(st.integers(0, 3))),
    )


@given(convolutions())
def test_convolutions_of_codes_are_their_twin_bit_for_bit(arguments: tuple[Any, ...]) -> None:
    ours = torch.ops.smpq.coalition_convolution(*arguments)
    theirs = reference.coalition_convolution(*arguments)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@st.composite
def epilogues(draw: st.DrawFn) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    parents, rows, channels = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.sampled_from([1, 3, 4, 16, 35]))
    size = [draw(st.integers(1, 3)), draw(st.integers(1, 17)), draw(st.integers(1, 17))]
    x = 10 * torch.randn(parents, *size, channels, generator=generator)
    affine, normalized = draw(st.booleans()), draw(st.booleans())
    if normalized:
        x = (x * 1024).round() / 1024  # their sums are exact in any order
    else:
        x.view(-1)[0] = draw(st.sampled_from([0.0, 1e38, -1e38, torch.inf, -torch.inf, torch.nan]))
    residual = torch.randn(2, *size, channels, generator=generator) if draw(st.booleans()) else None
    return (
        x,
        torch.randint(0, parents, (rows,), generator=generator),
        torch.randn(rows, channels, generator=generator) if affine else None,
        torch.randn(rows, channels, generator=generator) if affine else None,
        torch.randn(2, channels, generator=generator).double() if normalized else None,
        *(1e-5, residual),
        None if residual is None else torch.randint(0, 2, (rows,), generator=generator),
        *(draw(st.sampled_from([-1e30, 0.0])), 1e30, draw(st.booleans())),
        *children(rows, generator, draw(st.integers(0, 3))),
    )


@given(epilogues())
def test_epilogues_are_their_twin_bit_for_bit(arguments: tuple[Any, ...]) -> None:
    ours, theirs = torch.ops.smpq.coalition_epilogue(*arguments), reference.coalition_epilogue(*arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def example() -> list[Any]:
    """Plain arguments of coalition_convolution."""
    rows, grids = torch.tensor([1, 0]), torch.tensor([[0.1, 0, 0, 15], [0.2, 3, 0, 255]])
    return [
        torch.randint(0, 16, (2, 3, 5, 5, 4), dtype=torch.uint8),
        torch.zeros(2, dtype=torch.uint8),
        _pack(torch.randint(-7, 8, (2, 6, 4, 3, 3))),
        torch.zeros(2, 16, dtype=torch.int32),
        *(torch.tensor([0, 1]), torch.tensor([1, 1])),
        *(torch.rand(2, 6), torch.rand(2, 6), torch.rand(2, 6).double(), 1e-5, None, None, 0.0, 6.0),
        *([3, 3, 1, 1, 1, 1, 1, 1, 1, 1], False, True, [rows], [grids]),
    ]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.smpq.coalition_convolution.default, tuple(example()))
    x = torch.randn(2, 3, 5, 5, 6)
    rows, grids = example()[-2:]
    arguments = (x, torch.tensor([1, 0, 0]), None, None, None, 0.0, None, None, 0.0, 6.0, True, rows, grids)
    torch.library.opcheck(torch.ops.smpq.coalition_epilogue.default, arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 5, 5, 3, dtype=torch.uint8), "no multiple of 4"),
        (0, torch.zeros(2, 3, 5, 5, 4), "codes"),
        (1, torch.zeros(3, dtype=torch.uint8), "padding"),
        (2, torch.zeros(2, 1, 4, 1, 16, 4, dtype=torch.int8), "weight"),
        (3, torch.zeros(2, 6, dtype=torch.int32), "start"),
        (4, torch.tensor([0, 2]), r"parent\[1\] is 2"),
        (5, torch.tensor([-1, 0]), r"variant\[0\] is -1"),
        (6, torch.rand(2, 17), "blocks of 16"),
        (8, torch.zeros(2, 6), "norm"),
        (10, torch.zeros(1, 3, 5, 5, 6), "residual"),
        (14, [9, 9, 1, 1, 0, 0, 0, 0, 1, 1], "weight"),
        (14, [3, 3, 1, 1], "geometry"),
        (14, [3, 3, 2, 2, 0, 0, 0, 0, 3, 3], "larger than the padded codes"),
        (17, [torch.tensor([0, 5])], r"child_row\[1\] is 5"),
        (18, [torch.tensor([[0.1, 0, 0, 300], [0.1, 0, 0, 1]])], "0 to 255"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(position: int, value: Any, message: str) -> None:
    arguments = example()
    torch.ops.smpq.coalition_convolution(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.smpq.coalition_convolution(*arguments)


LAYERS = {
    "linear": (lambda: nn.Linear(20, 7), (20,)),
    "tokens": (lambda: nn.Linear(20, 7), (3, 20)),
    "conv": (lambda: nn.Conv2d(6, 9, 3, 2, 1), (6, 9, 8)),
    "no bias": (lambda: nn.Conv2d(6, 9, (1, 3), 1, (0, 2), (1, 2), bias=False), (6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, 1, 1, groups=6), (6, 9, 8)),
}


def both_paths(ev: Any, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs for every row from the integer path, and from the floating one."""
    lockstep = ev._executor.lockstep
    assert lockstep is not None and lockstep.integer.layers
    found: list[list[Tensor]] = [[], []]
    original = type(lockstep).__call__

    def listen(self: Any, *arguments: Any) -> Any:
        outputs = original(self, *arguments)
        found[self.integer is None].append(outputs)
        return outputs

    monkeypatch.setattr(type(lockstep), "__call__", listen)
    integer = lockstep.integer
    for lockstep.integer in (integer, None):
        ev(rows)
    lockstep.integer = integer
    return found[0], found[1]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [True, False])
def test_a_layer_is_that_of_the_floating_path_within_rounding(
    name: str, signed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(16, *shape) if signed else torch.rand(16, *shape)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean()

    ev = smpq_ext.evaluator(make(), [(x, torch.zeros(16))], bits=(1, 2, 3, 5, 8), loss=loss, fixed={})
    rows = np.array([[i, j] for i in range(5) for j in range(5)], np.int8)
    ours, theirs = both_paths(ev, rows, monkeypatch)
    for a, b in zip(ours, theirs, strict=True):
        # One layer has no second rounding: only the order of additions differs.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_a_network_gives_the_loss_of_the_floating_path(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Branches()
    data = [(torch.randn(256, 3, 10, 10), torch.randint(0, 5, (256,)))]
    ev = smpq_ext.evaluator(model, data, bits=(2, 4, 8), loss="kl", renormalize=False)
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (12, len(ev.slots))).astype(np.int8)
    fast = ev(rows)
    monkeypatch.setattr(ev._executor.lockstep, "integer", None)
    slow = ev(rows)
    assert (fast != slow).any()
    # A rounding difference that lands on a tie moves a code by a whole step, in few places of few images.
    np.testing.assert_allclose(fast, slow, rtol=5e-3)


def test_values_do_not_depend_on_rows_threads_or_memory() -> None:
    torch.manual_seed(0)
    model, data = Branches(), [(torch.randn(40, 3, 10, 10), torch.randint(0, 5, (40,)))]
    ev, narrow = (
        smpq_ext.evaluator(model, data, bits=(2, 4, 8), loss="kl", renormalize=False, memory=memory)
        for memory in (None, 1)
    )
    assert ev._executor.lockstep.integer.layers
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (9, len(ev.slots))).astype(np.int8)
    together = ev.by_group(rows)
    np.testing.assert_allclose(narrow.by_group(rows), together, rtol=1e-6)
    np.testing.assert_array_equal(ev.by_group(rows[::-1])[::-1], together)
    np.testing.assert_allclose(np.concatenate([ev.by_group(r[None]) for r in rows]), together, rtol=1e-6)
    mixture = ev.space.one_hot(rows[:1])
    mixture[0, 0, :2] = 0.5
    np.testing.assert_array_equal(ev.by_group(np.concatenate([ev.space.one_hot(rows), mixture]))[:-1], together)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        np.testing.assert_allclose(ev.by_group(rows), together, rtol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_wide_slots_and_odd_layers_stay_floating() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    data = [(torch.randn(8, 4, 8, 8), torch.randint(0, 3, (8,)))]
    narrow = smpq_ext.evaluator(model, data, bits=(2, 8), fixed={})
    wide = smpq_ext.evaluator(model, data, bits=(2, 12), fixed={"4": 8})
    assert set(narrow._executor.lockstep.integer.layers) == {1, 2}  # groups of several channels are not there
    assert set(wide._executor.lockstep.integer.layers) == {2}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
def test_rows_are_normalized_by_their_own_statistics(affine: bool, depthwise: bool) -> None:
    """What torch's BatchNorm in training mode gives, in float64, for the products of the row."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6 if depthwise else 19, 3, 1, 1, groups=6 if depthwise else 1)
    norm = nn.BatchNorm2d(conv.out_channels, eps=1e-3, affine=affine)
    with torch.no_grad():
        conv.bias += 5.0  # far from zero: the variance is a small difference of large squares
        for parameter in norm.parameters():
            parameter.normal_()
    x = torch.rand(16, 6, 9, 8)
    seen: list[Tensor] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs)
        return outputs.square().mean()

    model = nn.Sequential(conv, norm).eval()
    ev = smpq_ext.evaluator(model, [(x, torch.zeros(16))], bits=(1, 2, 3, 5, 8), loss=loss, fixed={}, renormalize=True)
    assert ev._executor.lockstep.integer.fused
    for row in np.ndindex(5, 5):
        bits = {name: ev.space.candidates[k][row[k]] for k, name in enumerate(ev.slots)}
        grids = ev.grids_for(bits)
        with torch.no_grad():
            x_, w = (
                _exact(tensor, grids[f"0.{kind}"], axis)
                for tensor, kind, axis in ((x, "activation", None), (conv.weight, "weight", 0))
            )
            y = nn.functional.conv2d(x_, w, conv.bias.double(), 1, 1, 1, conv.groups)
            expected = nn.functional.batch_norm(
                y, None, None, *(p.double() if affine else None for p in (norm.weight, norm.bias)), True, 0.0, norm.eps
            )
        seen.clear()
        ev(np.array([row], np.int8))
        ours = torch.cat(seen)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        mean, variance = ev.statistics(np.array(row, np.int8))["1"]
        np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(variance, y.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-12)


def _exact(x: Tensor, grid: Any, axis: int | None) -> Tensor:
    """x on its grid, in float64 without another rounding."""
    scale, zero_point = torch.from_numpy(grid.scale), torch.from_numpy(grid.zero_point)
    rounded = smpq_ext.fake_quantize(
        x, scale, zero_point, quant_min=grid.quant_min, quant_max=grid.quant_max, axis=axis
    )
    half = scale.double() / 2  # 1 bit: -1 and 1 half steps
    half = half if axis is None else half.view(-1, *[1] * (x.dim() - 1))
    return (rounded.double() / half).round() * half
