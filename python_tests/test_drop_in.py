"""Drop-in replacement: torch's own fake quantization is the oracle, and everything must be equal bit for bit."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx
from torch.nn import functional as F

import smpq_ext
from smpq_ext import drop_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning"),
    # torch.compile's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

PER_CHANNEL = {
    "observer": tq.MovingAveragePerChannelMinMaxObserver,
    "quant_min": -128,
    "quant_max": 127,
    "dtype": torch.qint8,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}
QCONFIGS = {
    "fused": tq.get_default_qat_qconfig("x86"),
    "unfused": tq.QConfig(tq.default_fake_quant, tq.FakeQuantize.with_args(**PER_CHANNEL)),
}
MAKERS = {
    name: getattr(tq.fake_quantize, name) for name in tq.fake_quantize.__all__ if name.endswith(("fake_quant", "127"))
}
del MAKERS["disable_fake_quant"], MAKERS["enable_fake_quant"]


class Ops(torch.autograd.profiler.profile):
    """Which fake quantization ran: that of our kernels, or torch's."""

    @property
    def names(self) -> set[str]:
        return {event.name for event in self.function_events or ()}

    @property
    def ours(self) -> bool:
        return "smpq::fake_quantize" in self.names

    @property
    def torchs(self) -> bool:
        return any(name.startswith("aten::fake_quantize_per") for name in self.names)


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of x for a gradient that is the same in every run."""
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def assert_same(function: Callable[[Tensor], Tensor], x: Tensor, ours: bool = True) -> None:
    expected = run(function, x)
    with smpq_ext.patched(), Ops() as ops:
        found = run(function, x)
    assert (ops.ours, ops.torchs) == (ours, not ours)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert layout(a) == layout(b)


def layout(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, right[key]), key


# --- the functions ---------------------------------------------------------------------------------------------------


@st.composite
def inputs(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 50.0, 1e4]))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "strided"]))
    if layout == "channels_last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1)
    elif layout == "strided" and x.dim():
        x = x[..., ::2]
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


scales = st.floats(2**-10, 32, width=32)
grids = st.integers(1, 16).flatmap(
    lambda bits: st.sampled_from([(0, (1 << bits) - 1), (-(1 << bits >> 1), (1 << bits >> 1) - 1)])
)


@given(inputs(), scales, grids, st.data())
@settings(max_examples=200, deadline=None)
def test_per_tensor_is_torchs_bit_for_bit(x: Tensor, scale: float, grid: tuple[int, int], data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(*grid))
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *grid), x)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    s, z = torch.tensor([scale]), torch.tensor([zero_point], dtype=dtype)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, s, z, *grid), x)


@given(inputs().filter(lambda x: x.dim() > 0), grids, st.data())
@settings(max_examples=200, deadline=None)
def test_per_channel_is_torchs_bit_for_bit(x: Tensor, grid: tuple[int, int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, x.dim() - 1))
    channels = x.shape[axis]
    s = torch.tensor(data.draw(st.lists(scales, min_size=channels, max_size=channels)))
    z = torch.tensor(data.draw(st.lists(st.integers(*grid), min_size=channels, max_size=channels)), dtype=torch.int32)
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s, z, axis, *grid), x)
    fractions = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=32), min_size=channels, max_size=channels)))
    f = z + fractions
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s, f, axis, *grid), x)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 1 << 30),
)
@settings(max_examples=100, deadline=None)
def test_fused_leaves_the_same_state(
    switches: list[tuple[bool, bool]], per_row: bool, symmetric: bool, dims: int, seed: int
) -> None:
    switches = [(True, True), *switches]  # until then torch's per-row state is uninitialised memory
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn([5, 3, 2, 4][: max(dims, 1 + per_row)], generator=generator) * (i + 1) for i in range(4)]

    def steps() -> list[Tensor]:
        low, high = (torch.empty(0), torch.empty(0)) if per_row else torch.tensor([torch.inf, -torch.inf])
        scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        results = []
        for x, (observe, quantize) in zip(xs, switches, strict=False):
            state = (torch.tensor([observe]).long(), torch.tensor([quantize]).long(), low, high, scale, zero_point)
            results += run(
                lambda x, s=state: torch.fused_moving_avg_obs_fake_quant(x, *s, 0.1, -8, 7, 0, per_row, symmetric), x
            )
            results += [t.clone() for t in (low, high, scale, zero_point)]
        return results

    expected = steps()
    with smpq_ext.patched():
        found = steps()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_empty_inputs() -> None:
    s, z = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 15), torch.empty(0, 4))
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s, z, 1, 0, 15), torch.empty(0, 4))


def test_what_our_kernels_do_not_compute_as_torch_does_is_left_to_torch() -> None:
    x, s, z = torch.randn(3, 4), torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32)
    wide = (-(2**31), 2**31 - 1)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 15), x.double(), ours=False)
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s, z, 1, 0, 15), x.double(), ours=False)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, 1e-7, 0, *wide), x, ours=False)
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s * 1e-6, z, 1, *wide), x, ours=False)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, s[0], torch.tensor(1.7), 0, 15), x, ours=False)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(x, s[0], 3, 0, 15), x, ours=False)
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(x, s, z.half(), 1, 0, 15), x, ours=False)


S, Z = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 16, 0, 15),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 15, 0),
        lambda x: torch.fake_quantize_per_tensor_affine(x.long(), 0.1, 0, 0, 15),
        lambda x: torch.fake_quantize_per_tensor_affine(x, S, Z, 0, 15),
        lambda x: torch.fake_quantize_per_tensor_affine(x, S[:1].clone().requires_grad_(), Z[:1], 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S, Z + 16, 1, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S, Z, 0, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S, Z, -1, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S, Z, 2, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S, Z.long(), 1, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S.double(), Z, 1, 0, 15),
        lambda x: torch.fake_quantize_per_channel_affine(x, S.clone().requires_grad_(), Z, 1, 0, 15),
    ],
)
def test_what_torch_refuses_is_refused_in_torchs_words(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 4)
    with pytest.raises((RuntimeError, IndexError, NotImplementedError)) as expected:
        call(x)
    with smpq_ext.patched(), pytest.raises(type(expected.value)) as found:
        call(x)
    assert str(found.value) == str(expected.value)


def test_keyword_arguments() -> None:
    settings = {"quant_min": 0, "quant_max": 15}
    x = torch.randn(3, 4)
    assert_same(lambda x: torch.fake_quantize_per_tensor_affine(input=x, scale=0.1, zero_point=3, **settings), x)
    assert_same(lambda x: torch.fake_quantize_per_channel_affine(input=x, scale=S, zero_point=Z, axis=1, **settings), x)


def test_the_grid_may_change_before_the_backward_pass() -> None:
    x, s, z = torch.randn(4, 4), S.clone(), Z.clone()

    def twice(x: Tensor) -> Tensor:
        s.copy_(S), z.copy_(Z)
        y = torch.fake_quantize_per_channel_affine(x, s, z, 0, -8, 7)
        s.mul_(10), z.add_(1)
        return y + torch.fake_quantize_per_channel_affine(x, s, z, 0, -8, 7)

    assert_same(twice, x)


# --- the block -------------------------------------------------------------------------------------------------------


def is_ours() -> bool:
    with Ops() as ops:
        torch.fake_quantize_per_tensor_affine(torch.ones(3), 0.1, 0, 0, 15)
    assert ops.ours != ops.torchs
    return ops.ours


def test_patched_blocks_nest_and_end() -> None:
    assert not is_ours()
    with smpq_ext.patched() as block:
        assert is_ours()
        with smpq_ext.patched(), block:
            assert is_ours()
        assert is_ours()
    assert not is_ours()
    with pytest.raises(ZeroDivisionError), smpq_ext.patched():
        _ = 1 / 0
    assert not is_ours()


def test_patched_is_of_its_own_thread() -> None:
    seen = []
    with smpq_ext.patched():
        thread = threading.Thread(target=lambda: seen.append(is_ours()))
        thread.start()
        thread.join()
        assert is_ours()
    assert seen == [False]


def test_other_functions_pass_through() -> None:
    with smpq_ext.patched():
        assert torch.equal(torch.ones(3).add(1), torch.full((3,), 2.0))
        assert torch.ones(2, 3, requires_grad=True).sum(dim=0).shape == (3,)


# --- the modules -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions with and without norm, a residual sum, a layer called twice, a sigmoid (fixed grid), a head."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.sum = torch.ao.nn.quantized.FloatFunctional()
        self.gate = nn.Sigmoid()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.quant(x))
        x = self.sum.add(x, self.body(self.body(x)))
        return self.dequant(self.head(self.gate(x).mean((2, 3))))


class FxNet(Net):
    """The same without what eager mode needs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(self.body(x))
        return self.head(self.gate(x).mean((2, 3)))


def prepared(kind: str, mode: str) -> nn.Module:
    torch.manual_seed(0)
    if mode == "fx":
        mapping = tq.get_default_qat_qconfig_mapping("x86").set_global(QCONFIGS[kind])
        return quantize_fx.prepare_qat_fx(FxNet().train(), mapping, torch.randn(1, 3, 8, 8))
    net = Net().train()
    net.qconfig = QCONFIGS[kind]
    return tq.prepare_qat(net)


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(6, 3, 8, 8, generator=generator)
        loss = F.cross_entropy(model(x), torch.randint(4, (6,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def types(model: nn.Module) -> set[type]:
    return {type(m) for m in model.modules() if isinstance(m, tq.FakeQuantizeBase)}


configurations = pytest.mark.parametrize(("kind", "mode"), [(k, m) for k in QCONFIGS for m in ("eager", "fx")])


@configurations
def test_qat_gives_the_same_parameters(kind: str, mode: str) -> None:
    model = prepared(kind, mode)
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(model))
    train(model)
    train(ours)
    assert_same_state(model, ours)
    x = torch.randn(2, 3, 8, 8)
    with Ops() as ops:
        found = ours.eval()(x)
    assert ops.ours
    assert torch.equal(model.eval()(x), found)
    model.train(), ours.train()
    for m in (model, ours):
        m.apply(tq.disable_observer)
        m.apply(torch.ao.nn.intrinsic.qat.freeze_bn_stats)
        train(m)
    assert_same_state(model, ours)
    for m in (model, ours):
        m.apply(tq.enable_observer).apply(tq.disable_fake_quant)
        train(m)
    assert_same_state(model, ours)


@configurations
def test_replace_is_in_place_and_reversible(kind: str, mode: str) -> None:
    model = train(prepared(kind, mode), 1)
    before, theirs, shown = dict(model.named_modules()), types(model), repr(model)
    reference = copy.deepcopy(model)
    assert smpq_ext.replace_fake_quant(model) is model
    assert types(model).isdisjoint(theirs)
    assert smpq_ext.replace_fake_quant(model) is model, "twice is once"
    assert all(module is before[name] for name, module in model.named_modules())
    assert_same_state(model, reference)
    assert repr(model) == shown
    assert smpq_ext.restore_fake_quant(model) is model
    assert types(model) == theirs
    assert_same_state(train(model), train(reference))


@configurations
def test_replaced_models_are_copied_and_loaded(kind: str, mode: str) -> None:
    model = train(prepared(kind, mode), 1)
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(model))
    assert types(copy.deepcopy(ours)) == types(ours)
    fresh = smpq_ext.replace_fake_quant(prepared(kind, mode))
    fresh.load_state_dict(model.state_dict())
    assert_same_state(train(fresh), train(copy.deepcopy(model)))


@configurations
def test_replaced_models_convert(kind: str, mode: str) -> None:
    model = train(prepared(kind, mode))
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(model))
    convert = quantize_fx.convert_fx if mode == "fx" else tq.convert
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(convert(model.eval())(x), convert(ours.eval())(x))


@pytest.mark.parametrize("name", MAKERS)
def test_every_fake_quantize_module_of_torch(name: str) -> None:
    theirs = MAKERS[name]()
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(theirs))
    assert types(theirs) <= set(drop_in._MODULES)
    assert types(ours) <= set(drop_in._MODULES.values())
    assert types(pickle.loads(pickle.dumps(ours))) == types(ours)
    for step in range(3):
        x = torch.randn(8, 5) * (step + 1)
        if step == 2:
            for m in (theirs, ours):
                m.disable_observer()
        for a, b in zip(run(theirs, x), run(ours, x), strict=True):
            assert torch.equal(a, b)
        assert_same_state(theirs, ours)
    assert all(torch.equal(a, b) for a, b in zip(theirs.calculate_qparams(), ours.calculate_qparams(), strict=True))


def test_subclasses_are_left_alone_and_reached_by_patched() -> None:
    class Theirs(tq.FakeQuantize):
        pass

    module = smpq_ext.replace_fake_quant(Theirs(quant_min=0, quant_max=255))
    assert type(module) is Theirs
    x = torch.randn(4, 4)
    module(x)
    assert_same(module, x)


def test_hooks_stay() -> None:
    module, calls = tq.FakeQuantize(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    smpq_ext.replace_fake_quant(module)(torch.ones(3))
    assert calls


def test_a_switch_on_a_device_is_read_again_when_it_was_written() -> None:
    class OnDevice(Tensor):
        is_cpu = False

    switch = torch.tensor([1]).as_subclass(OnDevice)
    assert drop_in._is_on(switch)
    assert drop_in._is_on(switch)
    switch[0] = 0
    assert not drop_in._is_on(switch)
    switch.copy_(torch.tensor([1]))
    assert drop_in._is_on(switch)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch.compiler.reset()


def functions(x: Tensor) -> Tensor:
    y = torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15)
    y = y + torch.fake_quantize_per_tensor_affine(x, S[0], Z[0], 0, 15)
    return y + torch.fake_quantize_per_channel_affine(x, S, Z, 1, 0, 15)


def test_a_block_around_a_compiled_call() -> None:
    compiled = torch.compile(functions, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # entering and leaving the block changes what runs, although the call was compiled before
        with Ops() as ops:
            run(compiled, torch.randn(3, 4))
        assert ops.torchs
        assert not ops.ours
        assert_same(compiled, torch.randn(3, 4))


def test_a_block_inside_a_compiled_function() -> None:
    def block(x: Tensor) -> Tensor:
        with smpq_ext.patched():
            return functions(x)

    x = torch.randn(3, 4)
    with Ops() as ops:
        found = run(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    assert ops.ours
    assert not ops.torchs
    assert all(torch.equal(a, b) for a, b in zip(found, run(functions, x), strict=True))


@configurations
@pytest.mark.parametrize("warm", [False, True])
def test_qat_of_a_compiled_model(kind: str, mode: str, warm: bool) -> None:
    model = prepared(kind, mode)
    if warm:
        train(model, 1)
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(model))
    train(model)
    train(torch.compile(ours, backend="eager"))  # others add up a parameter's gradients in an order of their own
    assert_same_state(model, ours)


@pytest.mark.parametrize("options", [{}, PER_CHANNEL], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fused_modules_compile_to_one_graph(options: dict[str, Any], backend: str) -> None:
    theirs = tq.FusedMovingAvgObsFakeQuantize(**options)
    theirs(torch.randn(4, 3))  # the first call gives the buffers their sizes
    ours = smpq_ext.replace_fake_quant(copy.deepcopy(theirs))
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for step, switch in enumerate([None, "disable_observer", "disable_fake_quant", "enable_observer"]):
        if switch:
            getattr(theirs, switch)(), getattr(ours, switch)()
        x = torch.randn(4, 3) * (step + 1)
        for a, b in zip(run(theirs, x), run(compiled, x), strict=True):
            assert torch.equal(a, b)
        assert_same_state(theirs, ours)


def test_swapping_a_compiled_model_is_noticed() -> None:
    model = prepared("fused", "eager")
    compiled = torch.compile(model, backend="eager")
    reference = copy.deepcopy(model)
    train(compiled, 1)
    smpq_ext.replace_fake_quant(compiled)
    with Ops() as ops:
        train(compiled, 1)
    assert ops.ours
    smpq_ext.restore_fake_quant(model)
    with Ops() as ops:
        train(compiled, 1)
    assert not ops.ours
    for _ in range(3):
        train(reference, 1)
    assert_same_state(model, reference)
