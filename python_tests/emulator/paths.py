"""Every path through the CUDA kernels against the specification, on the emulator. Run by test_emulated.py."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from smpq_ext import reference

torch.set_num_threads(1)
torch.ops.load_library(os.environ["SMPQ_EMULATED_LIBRARY"])
emulated = torch.ops.smpq_emulated

# Name -> shape and axis. A piece is 4096 elements, a tile 4096 of fp32, a short run less than 16.
LAYOUTS = {
    "per tensor": ((5003,), None),
    "one element": ((1,), None),
    "whole vectors in a channel": ((40, 128), 0),
    "vectors across two channels": ((64, 3, 7, 7), 0),
    "vectors across many channels": ((3, 7, 11), 2),
    "wrapping over the channels": ((3, 7, 31), 1),
    "run of several pieces": ((2, 5, 9000), 1),
    "run just over a piece": ((2, 3, 4099), 1),
    "run of one tile": ((3, 8192), 0),
    "channels last, whole period": ((20, 64), 1),
    "channels last, odd period": ((300, 17), 1),
    "channels last, three channels": ((700, 3), 1),
    "short runs": ((37, 6, 5), 1),
    "more rows than threads": ((2500, 17), 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bits(t: Tensor) -> Tensor:
    """The bits of t, with one NaN."""
    t = torch.where(t.isnan(), torch.nan, t)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


class Case:
    """Operands of one layout; `misaligned` makes x start in the middle of a vector."""

    def __init__(self, layout: str, dtype: torch.dtype, zero_point: str, misaligned: bool) -> None:
        self.shape, self.axis = LAYOUTS[layout]
        self.rng = torch.Generator().manual_seed(1)
        self.dtype, self.compute = dtype, torch.float64 if dtype == torch.float64 else torch.float32
        self.kind = zero_point
        size = torch.Size(self.shape).numel()
        shift = int(misaligned)
        self.x = (torch.randn(size + shift, generator=self.rng) * 3).to(dtype)[shift:].view(self.shape)
        self.grad = torch.randn(self.shape, generator=self.rng).to(dtype)
        self.channels = () if self.axis is None else (self.shape[self.axis],)

    def special(self) -> Tensor:
        x = self.x.clone() if self.x.storage_offset() == 0 else self.x
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e4], dtype=self.dtype)[: x.numel()]
        x.view(-1)[: values.numel()] = values
        return x

    def scale(self, *candidates: int) -> Tensor:
        return (torch.rand((*candidates, *self.channels), generator=self.rng) * 0.3 + 0.01).to(self.compute)

    def zero_point(self, *candidates: int) -> Tensor | None:
        shape = (*candidates, *self.channels)
        if self.kind == "none":
            return None
        if self.kind == "int":
            return torch.randint(-3, 4, shape, generator=self.rng, dtype=torch.int32)
        return (torch.rand(shape, generator=self.rng) * 4).to(self.compute)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


ZERO_POINTS = (("none", False), ("int", True), ("float", False))  # and whether x is misaligned


@pytest.fixture(params=[(dtype, *z) for dtype in DTYPES for z in ZERO_POINTS], ids=str)
def case(request: pytest.FixtureRequest, layout: str) -> Case:
    return Case(layout, *request.param)


def test_fake_quantize(case: Case) -> None:
    scale, low, high = case.scale(), None, None
    if case.channels:
        scale[0] = 0
        levels = 1 << torch.randint(0, 9, case.channels, generator=case.rng, dtype=torch.int32)
        low, high = -levels, levels - 1
    arguments = (case.special(), scale, case.zero_point(), low, high, -8, 7, case.axis, None)
    same(emulated.fake_quantize(*arguments), reference.fake_quantize(*arguments))


@pytest.mark.parametrize("with_scale", [False, True])
def test_fake_quantize_backward(case: Case, with_scale: bool) -> None:
    arguments = (case.grad, case.x, case.scale(), case.zero_point(), None, None, -8, 7, case.axis, None, with_scale)
    actual, expected = emulated.fake_quantize_backward(*arguments), reference.fake_quantize_backward(*arguments)
    same(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()) if e.numel() else 0)
    again = emulated.fake_quantize_backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("candidates", [1, 8, 11])
def test_quantization_error(case: Case, candidates: int) -> None:
    high = torch.arange(candidates, dtype=torch.int32)
    arguments = (case.x, case.scale(candidates), case.zero_point(candidates), -high - 1, high, case.axis)
    actual = emulated.quantization_error(*arguments)
    torch.testing.assert_close(actual, reference.quantization_error(*arguments), rtol=1e-5, atol=0)
    assert torch.equal(actual, emulated.quantization_error(*arguments))


def mixed(n: int, candidates: int, case: Case) -> Tensor:
    """Rows of several kinds: mixtures, sparse ones, one-hot ones, and one of zeros."""
    mixtures = (torch.rand(n, candidates, generator=case.rng) - 0.2).to(case.compute)
    mixtures[n // 3 :] *= torch.rand(n - n // 3, candidates, generator=case.rng) < 0.3
    for i in range(n // 2, n - 1):
        mixtures[i] = 0
        mixtures[i, i % candidates] = 1
    mixtures[-1] = 0
    return mixtures


@pytest.mark.parametrize("candidates", [1, 5, 12, 40])
@pytest.mark.parametrize("parents", [None, 3], ids=["no parent", "parents"])
@pytest.mark.parametrize("layout", ["per tensor", "wrapping over the channels", "vectors across many channels"])
def test_coalition_fake_quantize(case: Case, candidates: int, parents: int | None) -> None:
    x, n, parent = case.special(), 37, None
    if x.numel() > 5000:
        n = 5
    if parents:
        x = torch.stack([x, x * 2, x - 1])
        parent = torch.randint(0, parents, (n,), generator=case.rng)
        parent[: n // 2] = parent[: n // 2].sort().values
    high = torch.arange(candidates, dtype=torch.int32)
    mixtures = mixed(n, candidates, case)
    arguments = (x, case.scale(candidates), case.zero_point(candidates), -high - 1, high, mixtures, case.axis, parent)
    same(emulated.coalition_fake_quantize(*arguments), reference.coalition_fake_quantize(*arguments))


@pytest.mark.parametrize("count", [1, 40, 300])  # 32 fit the small parameter table, 240 the large
def test_coalition_fake_quantize_list(count: int) -> None:
    rng = torch.Generator().manual_seed(2)
    x = [torch.randn(3, 4 + i % 7, generator=rng) for i in range(count)]
    x[count // 2] = torch.empty(3, 0)
    scale = [torch.rand(3, 3, generator=rng) + 0.1 for _ in x]
    low = [torch.tensor([-1, -2, -8], dtype=torch.int32)] * count
    high = [torch.tensor([0, 1, 7], dtype=torch.int32)] * count
    mixtures = [torch.rand(1 + i % 50, 3, generator=rng) for i in range(count)]
    arguments = (x, scale, [], low, high, mixtures, 0)
    expected = reference.coalition_fake_quantize_list(*arguments)
    for a, e in zip(emulated.coalition_fake_quantize_list(*arguments), expected, strict=True):
        same(a, e)


def test_a_parent_that_x_does_not_hold_gives_nan() -> None:
    low, high = torch.tensor([-8], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    y = emulated.coalition_fake_quantize(
        torch.ones(2, 9), torch.ones(1), None, low, high, torch.ones(4, 1), None, torch.tensor([1, 2, -1, 0])
    )
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert (y[[0, 3]] == 1).all()
