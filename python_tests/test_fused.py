"""The fused path: its ops against their plain-torch twins bit for bit, and its values against the floating path."""

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
from smpq_ext.engine.fusion import pack

pytestmark = pytest.mark.usefixtures("compiled")


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


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of coalition_convolution: odd sizes, strides, dilations, depthwise, with and without a residual."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def integers(low: int, high: int, *size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, size, generator=generator, dtype=dtype)

    kind, together, input_range, weight_range = draw(
        st.sampled_from(
            [
                (torch.uint8, 4, (0, 256), (-128, 128)),
                (torch.int16, 2, (-4000, 4001), (-300, 301)),
                (torch.float32, 1, (-50, 50), (-50, 50)),
            ]
        )
    )
    depthwise = draw(st.booleans())
    parents, rows, variants, samples = (draw(st.integers(low, 3)) for low in (1, 0, 1, 1))
    channels = draw(st.sampled_from([1, 3, 4, 16, 20, 33]))
    outs = channels if depthwise else draw(st.sampled_from([1, 5, 16, 32, 50, 64, 80]))
    kernel, stride, before, after = ([draw(st.integers(low, 3)) for _ in range(2)] for low in (1, 1, 0, 0))
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    height, width = (draw(st.integers(d * (k - 1) + 1, 12)) for d, k in zip(dilation, kernel, strict=True))
    padded = -(-channels // 4) * 4 if together > 1 else channels
    x = integers(*input_range, parents, samples, height, width, padded).to(kind)
    x[..., channels:] = 0
    weight = integers(*weight_range, variants, outs, 1 if depthwise else channels, *kernel)
    weight = weight.to({torch.uint8: torch.int8}.get(kind, kind))
    sizes = zip((height, width), kernel, stride, before, after, dilation, strict=True)
    size = [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, p, q, d in sizes]
    residual = residual_row = None
    if draw(st.booleans()):
        residual = 100 * torch.randn(2, samples, *size, outs, generator=generator)
        residual_row = integers(0, 2, rows)
    norm = torch.randn(2, outs, generator=generator).double() if draw(st.booleans()) else None
    return (
        x,
        integers(*input_range, parents).to(kind),
        pack(weight, depthwise, together),
        integers(-1000, 1000, rows, -(-outs // 16) * 16).to(torch.float32 if together == 1 else torch.int32),
        integers(0, parents, rows),
        integers(0, variants, rows),
        torch.rand(rows, outs, generator=generator) * 1e-2,
        torch.randn(rows, outs, generator=generator),
        *(norm, 1e-5, residual, residual_row),
        *draw(st.sampled_from([(0.0, 6.0), (-1e30, 1e30), (0.0, 3.4e38)])),
        [*kernel, *stride, *before, *after, *dilation],
        *(depthwise, draw(st.booleans())),
        *children(rows, generator, draw(st.integers(0, 4))),
    )


@given(convolutions())
def test_convolutions_are_their_twin_bit_for_bit(arguments: tuple[Any, ...]) -> None:
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
        *children(rows, generator, draw(st.integers(0, 4))),
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
        pack(torch.randint(-7, 8, (2, 6, 4, 3, 3)).to(torch.int8), False, 4),
        torch.zeros(2, 16, dtype=torch.int32),
        *(torch.tensor([0, 1]), torch.tensor([1, 1])),
        *(torch.rand(2, 6), torch.rand(2, 6), torch.rand(2, 6).double(), 1e-5, None, None, 0.0, 6.0),
        *([3, 3, 1, 1, 1, 1, 1, 1, 1, 1], False, True, [rows], [grids], [8]),
    ]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.smpq.coalition_convolution.default, tuple(example()))
    x = torch.randn(2, 3, 5, 5, 6)
    rows, grids, _ = example()[-3:]
    mixed = [torch.rand(2, 3, 5).ceil()]
    for bits, grid in ((8, grids), (16, mixed), (32, mixed)):
        arguments = (x, torch.tensor([1, 0, 0]), None, None, None, 0.0, None, None, 0.0, 6.0, True, rows, grid, [bits])
        torch.library.opcheck(torch.ops.smpq.coalition_epilogue.default, arguments)


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
        (14, [9, 9, 1, 1, 0, 0, 0, 0, 1, 1], "weight"),
        (14, [3, 3, 1, 1], "geometry"),
        (14, [3, 3, 2, 2, 0, 0, 0, 0, 3, 3], "larger than the padded x"),
        (17, [torch.tensor([0, 5])], r"child_row\[1\] is 5"),
        (18, [torch.tensor([[0.1, 0, 0]])], "child_grid"),
        (19, [7], "child_bits"),
        (19, [8, 8], "as many entries"),
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


def both_paths(ev: Any, rows: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs for every row from fused calls, and layer by layer from torch."""
    lockstep = ev._executor.lockstep
    assert lockstep is not None and lockstep.integer.fused and lockstep.floating.fused
    found: list[list[Tensor]] = []
    original = type(lockstep).__call__

    def listen(self: Any, *arguments: Any) -> Any:
        outputs = original(self, *arguments)
        found[-1].append(outputs)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lockstep), "__call__", listen)
        found.append([])
        ev(rows)
        patch.setattr(lockstep, "integer", None)
        patch.setattr(lockstep, "floating", None)
        found.append([])
        ev(rows)
    return found[0], found[1]


def mixtures(ev: Any, n: int, rng: np.random.Generator) -> np.ndarray:
    """Shares of every candidate, some of them 0, [n, slots, candidates]."""
    shares = rng.random((n, *ev.space.mask.shape)) * (rng.random((n, *ev.space.mask.shape)) < 0.8) * ev.space.mask
    return np.where(shares.sum(2, keepdims=True) > 0, shares, ev.space.mask).astype(np.float32)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("mixture_bits", [32, 16])
def test_a_layer_is_that_of_torch_within_rounding(name: str, signed: bool, mixture_bits: int) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(16, *shape) if signed else torch.rand(16, *shape)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean()

    ev = smpq_ext.evaluator(
        *(make(), [(x, torch.zeros(16))]), bits=(1, 2, 3, 5, 8), loss=loss, fixed={}, mixture_bits=mixture_bits
    )
    rows = np.array([[i, j] for i in range(5) for j in range(5)], np.int8)
    for asked, tolerance in (
        (rows, 1e-4),
        (mixtures(ev, 9, np.random.default_rng(0)), 1e-4 if mixture_bits == 32 else 1e-3),
    ):
        ours, theirs = both_paths(ev, asked)
        for a, b in zip(ours, theirs, strict=True):
            # One layer has no second rounding: only the order of additions differs, or 16 bits.
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("activation_bits", [(2, 4, 8), (9, 12), ()])
def test_floating_layers_are_those_of_torch(activation_bits: tuple[int, ...]) -> None:
    """Beyond 8 bits, of weights only, and float slots, as assignments and as mixtures."""
    torch.manual_seed(0)
    x = torch.rand(16, 6, 9, 8)
    ev = smpq_ext.evaluator(
        nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.ReLU6(), nn.Conv2d(9, 4, 1)).eval(),
        [(x, torch.zeros(16))],
        bits=(2, 10),
        activation_bits=activation_bits,
        loss=lambda outputs, targets: outputs.square().mean(),
        fixed={"2.weight": "float"},
    )
    rng = np.random.default_rng(0)
    lockstep = ev._executor.lockstep
    assert not lockstep.integers and len(lockstep.floating.fused) == 2
    for rows in (rng.integers(0, ev.space.highest() + 1, (5, len(ev.slots))).astype(np.int8), mixtures(ev, 5, rng)):
        for a, b in zip(*both_paths(ev, rows), strict=True):
            # A tie in the second layer's input goes the other way by one step.
            assert (a - b).abs().max() <= 0.1 * b.abs().max()
            assert ((a - b).abs() > 1e-4 * b.abs().max()).double().mean() < 0.01


def test_a_network_gives_the_loss_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Branches()
    data = [(torch.randn(256, 3, 10, 10), torch.randint(0, 5, (256,)))]
    ev = smpq_ext.evaluator(model, data, bits=(2, 4, 8), loss="kl", renormalize=False)
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (12, len(ev.slots))).astype(np.int8)
    for asked in (rows, mixtures(ev, 12, np.random.default_rng(1))):
        fast = ev(asked)
        with monkeypatch.context() as patch:
            patch.setattr(ev._executor.lockstep, "integer", None)
            patch.setattr(ev._executor.lockstep, "floating", None)
            slow = ev(asked)
        assert (fast != slow).any()
        # A rounding difference that lands on a tie moves a code by a whole step, in few places of few images.
        np.testing.assert_allclose(fast, slow, rtol=5e-3)


@pytest.mark.parametrize("mixture_bits", [32, 16])
@pytest.mark.parametrize("renormalize", [False, True])
def test_values_of_mixtures_do_not_depend_on_rows_threads_or_memory(mixture_bits: int, renormalize: bool) -> None:
    torch.manual_seed(0)
    model, data = Branches(), [(torch.randn(40, 3, 10, 10), torch.randint(0, 5, (40,)))]
    settings: Any = {"bits": (2, 4, 8), "loss": "kl", "renormalize": renormalize, "mixture_bits": mixture_bits}
    ev, narrow = (smpq_ext.evaluator(model, data, **settings, memory=memory) for memory in (None, 1))
    rows = mixtures(ev, 9, np.random.default_rng(0))
    together = ev.by_group(rows)
    np.testing.assert_array_equal(ev.by_group(rows[::-1])[::-1], together)
    np.testing.assert_allclose(narrow.by_group(rows), together, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([ev.by_group(r[None]) for r in rows]), together, rtol=1e-6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        np.testing.assert_allclose(ev.by_group(rows), together, rtol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_values_do_not_depend_on_rows_threads_or_memory() -> None:
    torch.manual_seed(0)
    model, data = Branches(), [(torch.randn(40, 3, 10, 10), torch.randint(0, 5, (40,)))]
    ev, narrow = (
        smpq_ext.evaluator(model, data, bits=(2, 4, 8), loss="kl", renormalize=False, memory=memory)
        for memory in (None, 1)
    )
    assert ev._executor.lockstep.integers
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
    assert narrow._executor.lockstep.integers == {1, 2}  # groups of several channels are not there
    assert wide._executor.lockstep.integers == {2}


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
