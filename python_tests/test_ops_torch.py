"""The ops as citizens of torch: opcheck, gradients, vmap, compile, large tensors. On CPU and CUDA."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import smpq_ext
from smpq_ext import ops, reference

pytestmark = pytest.mark.usefixtures("compiled")
LOW, HIGH = ops.bounds(torch.tensor([2, 3, 8], dtype=torch.int32))


@pytest.fixture(scope="module", autouse=True)
def _not_emulated() -> None:
    if os.environ.get("SMPQ_TEST_DEVICE") == "emulated":
        pytest.skip("the emulator has kernels only")


def cases(dtype: torch.dtype, device: str) -> dict[str, list[tuple]]:
    """Arguments for every op, with and without axis, zero point, bounds per channel, groups and parent."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(4, 6, 5, dtype=torch.float64, device=device).to(dtype)
    one = torch.tensor(0.1, dtype=compute, device=device)
    six = torch.rand(6, dtype=compute, device=device) + 0.1
    zero = torch.randint(-2, 2, (6,), dtype=torch.int32, device=device)
    low, high = LOW.to(device), HIGH.to(device)
    many = torch.rand(3, 6, dtype=compute, device=device) + 0.1
    mixtures = torch.rand(4, 3, dtype=compute, device=device)
    parent = torch.tensor([0, 3, 3, 1], device=device)
    groups = torch.rand(4, 6, 1, dtype=compute, device=device) + 0.1
    learn = x.clone().requires_grad_(), six.clone().requires_grad_()
    forward = [
        (x, one, None, None, None, -8, 7, None, None),
        (x, six, zero, None, None, -8, 7, 1, None),
        (learn[0], learn[1], six.clone().requires_grad_(), zero - 4, zero + 4, 0, 0, -2, None),
        (x, groups, None, None, None, 0, 15, None, 5),
    ]
    coalition = [
        (x, many[:, 0], None, low, high, mixtures, None, None),
        (learn[0], many, many, low, high, mixtures.clone().requires_grad_(), 1, None),
        (x, many, None, low, high, mixtures, 0, parent),
    ]
    return {
        "fake_quantize": forward,
        "fake_quantize_backward": [
            (torch.ones_like(x), *args, k == 2)
            for k, args in enumerate(
                [tuple(a.detach() if isinstance(a, Tensor) else a for a in args) for args in forward]
            )
        ],
        "coalition_fake_quantize": coalition,
        "coalition_fake_quantize_list": [
            ([x, x[0]], [many[:, :4], many], [many[:, :4], many], [low] * 2, [high] * 2, [mixtures] * 2, 0)
        ],
        "quantization_error": [(x, many[:, 0], None, low, high, None), (x, many, many, low, high, 1)],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op: str, dtype: torch.dtype, device: str, opcheck: Any) -> None:
    for args in cases(dtype, device)[op]:
        opcheck(getattr(torch.ops.smpq, op).default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_opcheck_layers(dtype: torch.dtype, device: str, opcheck: Any) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    x, w = random(3, 2, 4, 5, 5).requires_grad_(), random(2, 6, 2, 3, 3).requires_grad_()
    convolution = (x, w, random(6), [0, 1, 1], [1, 1], [1, 1], [1, 1], 2)
    opcheck(torch.ops.smpq.coalition_conv2d.default, convolution)
    x, w = random(3, 2, 4).requires_grad_(), random(2, 6, 4).requires_grad_()
    opcheck(torch.ops.smpq.coalition_linear.default, (x, w, None, [1, 1, 0]))


def test_schemas_are_those_of_the_reference() -> None:
    for op in (*ops.OPS, *ops.ENGINE_OPS):
        schema = str(getattr(torch.ops.smpq, op).default._schema)
        assert schema == f"smpq::{op}" + torch.library.infer_schema(getattr(reference, op), mutates_args=())


def test_layers_are_one_torch_layer_for_each_row(device: str) -> None:
    x, w, b = (
        torch.randn(4, 2, 4, 7, 7, device=device),
        torch.randn(3, 8, 2, 3, 3, device=device),
        torch.randn(8, device=device),
    )
    variant = [2, 0, 0, 1]
    ours = smpq_ext.coalition_conv2d(x, w, b, variant, (2, 2), (1, 1), (1, 1), 2)
    for row, v, y in zip(x, variant, ours, strict=True):
        assert torch.allclose(y, torch.nn.functional.conv2d(row, w[v], b, 2, 1, 1, 2), atol=1e-5)
    x, w = torch.randn(4, 2, 5, 6, device=device), torch.randn(3, 8, 6, device=device)
    for row, v, y in zip(x, variant, smpq_ext.coalition_linear(x, w, b, variant), strict=True):
        assert torch.allclose(y, torch.nn.functional.linear(row, w[v], b), atol=1e-5)
    with pytest.raises(RuntimeError, match="outside the 3 variants"):
        smpq_ext.coalition_linear(x, w, b, [0, 1, 2, 3])


def test_layers_as_one_call_are_those_of_each_row(device: str) -> None:
    """On CUDA rows of several weights run together; here that way is compared with the loop, wherever we are."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, w, b = random(4, 2, 4, 7, 7), [random(8, 2, 3, 3) for _ in range(4)], random(8)
    for bias in (b, None):
        ours = ops._conv2d_together(x, w, bias, (2, 1), (1, 0), (1, 2), 2)
        loop = [torch.nn.functional.conv2d(r, k, bias, (2, 1), (1, 0), (1, 2), 2) for r, k in zip(x, w, strict=True)]
        torch.testing.assert_close(ours, torch.stack(loop))
    w = [random(8, 6) for _ in range(4)]
    for x, bias in ((random(4, 2, 3, 6), b), (random(4, 5, 6), None), (random(4, 6), b)):
        loop = [torch.nn.functional.linear(r, k, bias) for r, k in zip(x, w, strict=True)]
        torch.testing.assert_close(ops._linear_together(x, w, bias), torch.stack(loop))


def test_gradcheck_with_the_rounding_held(device: str) -> None:
    """In float64 the gradients are the numeric ones of the same function with its rounding errors held constant."""
    torch.manual_seed(0)
    x = (torch.randn(40, dtype=torch.float64, device=device) * 3).requires_grad_()
    scale = torch.tensor(0.37, dtype=torch.float64, device=device, requires_grad=True)
    zero = torch.tensor(0.21, dtype=torch.float64, device=device, requires_grad=True)
    low, high = -4, 3
    with torch.no_grad():
        raw = x / scale + zero
        held, below, above = torch.round(raw) - raw, torch.round(raw) < low, torch.round(raw) > high

    def smooth(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        code = torch.where(below, low, torch.where(above, high, x / scale + zero + held))
        return (code - zero) * scale

    def ours(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return smpq_ext.fake_quantize(x, scale, zero, quant_min=low, quant_max=high)

    assert below.any() and above.any()
    assert torch.allclose(ours(x, scale, zero), smooth(x, scale, zero), rtol=1e-12)
    assert torch.autograd.gradcheck(smooth, (x, scale, zero))  # numeric against torch's analytic gradient
    grad = torch.randn(40, dtype=torch.float64, device=device)
    for mine, numeric in zip(
        torch.autograd.grad(ours(x, scale, zero), (x, scale, zero), grad),
        torch.autograd.grad(smooth(x, scale, zero), (x, scale, zero), grad),
        strict=True,
    ):
        assert torch.allclose(mine, numeric, rtol=1e-9)


def test_second_derivatives_are_torchs(device: str) -> None:
    x = torch.randn(3, 40, device=device)
    scale, zero = torch.rand(3, device=device) + 0.1, torch.zeros(3, device=device)
    found = []
    for f in (
        lambda x: smpq_ext.fake_quantize(x, scale, zero, bits=3, axis=0),
        lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -4, 3),
    ):
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(y).square().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), y)[0])
    assert torch.equal(*found) and found[0].any()


def test_coalition_gradients_are_those_of_its_sum(device: str) -> None:
    torch.manual_seed(0)
    low, high = LOW.to(device), HIGH.to(device)
    for parent in (None, torch.tensor([1, 0, 1, 2], device=device)):
        x = torch.randn(3, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
        axis, channels = (1, 5) if parent is None else (0, 5)
        scale = (torch.rand(3, channels, dtype=torch.float64, device=device) + 0.1).requires_grad_()
        mixtures = torch.rand(4, 3, dtype=torch.float64, device=device, requires_grad=True)
        ours = smpq_ext.coalition_fake_quantize(x, scale, None, low, high, mixtures, axis=axis, parent=parent)
        grad = torch.randn_like(ours)
        rows = []
        for i in range(4):
            source = x if parent is None else x[parent[i]]
            parts = [
                mixtures[i, c]
                * smpq_ext.fake_quantize(source, scale[c], quant_min=int(low[c]), quant_max=int(high[c]), axis=axis)
                for c in range(3)
            ]
            rows.append(sum(parts))
        mine = torch.autograd.grad(ours, (x, scale, mixtures), grad)
        theirs = torch.autograd.grad(torch.stack(rows), (x, scale, mixtures), grad)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_vmap_over_coalitions_is_one_call_with_more_rows(device: str) -> None:
    x = torch.randn(6, 5, device=device)
    scale = torch.rand(3, device=device) + 0.1
    mixtures = torch.rand(4, 2, 3, device=device)
    low, high = LOW.to(device), HIGH.to(device)

    def run(m: Tensor) -> Tensor:
        return smpq_ext.coalition_fake_quantize(x, scale, None, low, high, m)

    assert torch.equal(torch.func.vmap(run)(mixtures), torch.stack([run(m) for m in mixtures]))
    assert torch.equal(torch.func.vmap(run, in_dims=1)(mixtures), torch.stack([run(m) for m in mixtures.unbind(1)]))


def test_vmap_over_inputs_and_grids(device: str) -> None:
    x = torch.randn(4, 6, 5, device=device)
    scale = torch.rand(4, 6, device=device) + 0.1
    ours = torch.func.vmap(lambda x, s: smpq_ext.fake_quantize(x, s, bits=4, axis=0))(x, scale)
    assert torch.equal(
        ours, torch.stack([smpq_ext.fake_quantize(a, s, bits=4, axis=0) for a, s in zip(x, scale, strict=True)])
    )
    ours = torch.func.vmap(lambda x: smpq_ext.fake_quantize(x, scale[0], bits=4, axis=0), in_dims=0)(x)
    assert torch.equal(ours, torch.stack([smpq_ext.fake_quantize(a, scale[0], bits=4, axis=0) for a in x]))


@pytest.mark.slow
def test_compile_fullgraph(device: str) -> None:
    torch.manual_seed(0)
    low, high = LOW.to(device), HIGH.to(device)

    def run(x: Tensor, scale: Tensor, mixtures: Tensor) -> Tensor:
        y = smpq_ext.fake_quantize(x, scale[0], bits=4, axis=1)
        rows = smpq_ext.coalition_fake_quantize(y, scale, None, low, high, mixtures, axis=1)
        error = smpq_ext.quantization_error(x.detach(), scale.detach(), None, low, high, axis=1)
        w = torch.stack([scale, scale + 1])
        return smpq_ext.coalition_linear(rows, w, None, [0, 1, 1, 0]).sum() + error.sum()

    for count in (3, 8):  # the second shape runs with dynamic sizes
        x = torch.randn(count, 6, device=device, requires_grad=True)
        scale = (torch.rand(3, 6, device=device) + 0.1).requires_grad_()
        mixtures = torch.rand(4, 3, device=device)
        eager = torch.autograd.grad(run(x, scale, mixtures), (x, scale))
        fast = torch.compile(run, fullgraph=True, backend="aot_eager")
        for a, b in zip(torch.autograd.grad(fast(x, scale, mixtures), (x, scale)), eager, strict=True):
            assert torch.allclose(a, b)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device: str) -> None:
    count = 2**31 + 1025
    free = (
        torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    if free < 10 * 2**30:
        pytest.skip("needs 10 GiB of free memory")
    x = torch.full((count,), 0.3, dtype=torch.bfloat16, device=device)
    x[-1] = 1.7
    y = smpq_ext.fake_quantize(x, 0.5, bits=4)
    del x
    assert y[0] == y[2**31] == y[-2] == 0.5
    assert y[-1] == 1.5
