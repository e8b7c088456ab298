"""What only a GPU can show; skipped without one. Run by `make gpu`, like the op tests with SMPQ_TEST_DEVICE=cuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import MODELS, build
from torch import Tensor, nn
from torch import distributed as dist

import smpq_ext
from python_tests.plain_loop import oracle, random_assignments, random_mixtures
from smpq_ext import distributed, ops, reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
WIDTHS = torch.tensor([2, 3, 4, 6, 8], dtype=torch.int32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [((5003,), None), ((64, 3, 7, 7), 0), ((300, 17), 1), ((2, 5, 9000), 1)]


def operands(shape: tuple[int, ...], axis: int | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, scale, lowest and highest codes, mixtures, grad, on the CPU."""
    rng = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    channels = () if axis is None else (shape[axis],)
    x = (3 * torch.randn(shape, generator=rng)).to(dtype)
    x.view(-1)[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    scale = (torch.rand((len(WIDTHS), *channels), generator=rng) + 0.01).to(compute)
    mixtures = torch.rand(9, len(WIDTHS), generator=rng).to(compute)
    mixtures[3:6] = torch.eye(len(WIDTHS), dtype=compute)[:3]
    return x, scale, *ops.bounds(WIDTHS), mixtures, torch.randn(shape, generator=rng).to(dtype)


def calls(axis: int | None) -> dict[str, Callable[..., Any]]:
    """Elementwise ops of operands."""

    def backward(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mixtures: Tensor, grad: Tensor) -> Tensor:
        return ops._smpq.fake_quantize_backward(grad, x, scale[2], None, None, None, -8, 7, axis, None, False)[0]

    def coalition(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, mixtures: Tensor, grad: Tensor) -> Tensor:
        return ops.coalition_fake_quantize(x, scale, None, low, high, mixtures, axis=axis)

    return {
        "fake_quantize": lambda x, scale, *_: ops.fake_quantize(x, scale[2], bits=4, axis=axis),
        "backward": backward,
        "coalition": coalition,
    }


OPS = tuple(calls(None))


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_cpu_and_cuda_give_the_same_bits(op: str, dtype: torch.dtype, shape: tuple[int, ...], axis: int | None) -> None:
    given = operands(shape, axis, dtype)
    call = calls(axis)[op]
    here, there = call(*given), call(*(t.cuda() for t in given)).cpu()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(here.isnan(), there.isnan())
    assert torch.equal(here.nan_to_num(0).view(kind), there.nan_to_num(0).view(kind))


@pytest.mark.parametrize("op", OPS)
def test_ops_run_on_the_stream_of_their_caller(op: str) -> None:
    x, *others = (t.cuda() for t in operands((64, 3, 7, 7), 0, torch.float32))
    call = calls(0)[op]
    expected = call(x, *others)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: on another stream the op would see zeros
        late.copy_(x)
        found = call(late, *others)
    stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_ops_are_captured_in_a_cuda_graph(op: str) -> None:
    x, *others = (t.cuda() for t in operands((64, 3, 7, 7), 0, torch.float32))
    call = calls(0)[op]
    held = torch.zeros_like(x)
    call(held, *others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(held, *others)
    for value in (x, -x):
        held.copy_(value)
        graph.replay()
        torch.testing.assert_close(found, call(value, *others), rtol=0, atol=0, equal_nan=True)


def on_gpu(name: str, **settings: Any) -> Any:
    model, data = build(name, 0, sizes=(33,))
    there = [(x.cuda(), y.cuda()) for x, y in data]
    return smpq_ext.evaluator(model.cuda(), there, bits=(2, 3, 8), fixed={}, **settings)


@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_has_the_values_of_a_plain_loop(name: str, renormalize: bool) -> None:
    ev = on_gpu(name, renormalize=renormalize)
    assignments, mixtures = random_assignments(ev, 7), random_mixtures(ev, 3)
    expected = [oracle(ev, m) for m in (*ev.space.one_hot(assignments), *mixtures)]
    found = np.concatenate([ev(assignments), ev(mixtures)])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)  # a rounding tie may fall to the other side
    np.testing.assert_array_equal(ev(assignments), ev(assignments))


@pytest.mark.parametrize("mixed", [False, True], ids=["assignments", "mixtures"])
@pytest.mark.parametrize("name", ["Branches", "Tokens", "Shared"])
def test_a_replayed_forward_is_the_launched_one_bit_for_bit(name: str, mixed: bool) -> None:
    ev = on_gpu(name, renormalize=False)
    assert ev._executor.replay is not None, ev.notes
    rows = random_mixtures(ev, 5) if mixed else random_assignments(ev, 9)
    ev.rows_per_batch = 2
    replayed = ev.by_group(rows)
    ev._executor.replay = None
    np.testing.assert_array_equal(replayed, ev.by_group(rows))


@pytest.mark.parametrize("name", ["Branches", "Tokens"])
def test_integers_have_the_values_of_floats(name: str) -> None:
    ev = on_gpu(name, renormalize=False)
    lockstep = ev._executor.lockstep
    assert lockstep is not None and lockstep.integers
    rows = random_assignments(ev, 9)
    integers = ev.by_group(rows)
    ev._executor.replay = lockstep.integer = lockstep.floating = None
    np.testing.assert_allclose(integers, ev.by_group(rows), rtol=1e-4)


def test_a_search_resumes_and_its_plan_can_be_applied(tmp_path: Path) -> None:
    model, data = build("Branches", 0, sizes=(40,))
    data = [(x.cuda(), y.cuda()) for x, y in data]
    arguments = {"bits": (2, 4, 8), "budget": "weight-bits=4,activation-bits=4", "evaluations": 300}
    arguments |= {"store": str(tmp_path / "e.sqlite"), "renormalize": False}
    first = smpq_ext.search(model.cuda(), data, **arguments)
    again = smpq_ext.search(model, data, **arguments)
    assert first.plan.to_json() == again.plan.to_json()
    quantized = smpq_ext.apply(model, first.plan)
    assert next(quantized.parameters()).is_cuda
    with torch.no_grad():
        loss = nn.functional.cross_entropy(quantized(data[0][0]), data[0][1])
    assert float(loss) < 3 * first.float_loss + 1


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
def test_bytes_go_over_nccl_and_a_shared_evaluator_has_the_values_of_its_own() -> None:
    assert distributed._gather(b"some bytes") == [b"some bytes"]
    assert distributed._by_first(lambda: (b"told", 3)) == (b"told", 3)
    ev = on_gpu("Branches", renormalize=False)
    rows = random_assignments(ev, 9)
    np.testing.assert_array_equal(distributed.SharedEvaluator(ev).by_group(rows), ev.by_group(rows))


def test_the_reference_is_the_same_there() -> None:
    x, scale, *_ = operands((300, 17), 1, torch.float32)
    arguments = (x, scale[1], None, None, None, -4, 3, 1, None)
    there = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
    torch.testing.assert_close(
        reference.fake_quantize(*there).cpu(), reference.fake_quantize(*arguments), rtol=0, atol=0, equal_nan=True
    )
