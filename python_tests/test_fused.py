"""Fused calls in the engine: codes, floats, fixed point against torch layer by layer, and what never changes values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from random_models import Branches
from torch import Tensor, nn

import smpq_ext

pytestmark = pytest.mark.usefixtures("compiled")


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


def test_wide_slots_stay_floating() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    data = [(torch.randn(8, 4, 8, 8), torch.randint(0, 3, (8,)))]
    narrow = smpq_ext.evaluator(model, data, bits=(2, 8), fixed={})
    wide = smpq_ext.evaluator(model, data, bits=(2, 12), fixed={"4": 8})
    assert narrow._executor.lockstep.integers == {0, 1, 2}
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
