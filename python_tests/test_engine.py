"""The evaluator against a plain loop over torch's own fake-quantize functions, and what it promises to its caller."""

from __future__ import annotations

import copy
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from contracts import EvaluatorContract
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from python_tests.plain_loop import oracle, random_assignments, random_mixtures
from python_tests.random_models import CLASSES, MODELS, build
from smpq_ext.core import Plan, SmpqError
from smpq_ext.engine import losses

BITS = (2, 3, 8)
slow = settings(max_examples=16, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
names = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 10_000)


@slow
@given(names, seeds, st.booleans(), st.sampled_from(["mse", "minmax", "percentile"]))
def test_values_are_those_of_a_plain_loop(name: str, seed: int, renormalize: bool, calibrate: str) -> None:
    model, data = build(name, seed)
    ev = smpq_ext.evaluator(
        model, data, bits=(1, *BITS), activation_bits=(2, 4), renormalize=renormalize, fixed={}, calibrate=calibrate
    )
    assignments, mixtures = random_assignments(ev, 3, seed), random_mixtures(ev, 2, seed)
    expected = [oracle(ev, m) for m in (*ev.space.one_hot(assignments), *mixtures)]
    # Another order of operations: a rounding difference that lands on a tie moves one code by a whole step.
    np.testing.assert_allclose(np.concatenate([ev(assignments), ev(mixtures)]), expected, rtol=1e-3, atol=1e-5)


@slow
@given(names, seeds, st.booleans())
def test_one_hot_mixtures_are_assignments_bit_for_bit(name: str, seed: int, renormalize: bool) -> None:
    model, data = build(name, seed)
    ev = smpq_ext.evaluator(model, data, bits=BITS, activation_bits=(2, 4), renormalize=renormalize)
    assignments = random_assignments(ev, 4, seed)
    assert (ev(assignments) == ev(ev.space.one_hot(assignments))).all()
    np.testing.assert_allclose(ev.by_group(assignments) @ ev.groups, ev(assignments), rtol=1e-12)
    assert ev(assignments).dtype == np.float64


@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
@pytest.mark.parametrize("loss", [None, "kl"])
@pytest.mark.parametrize("name", ["Branches", "Tokens"])
def test_losses_of_labels_are_those_of_parts(
    name: str, loss: str | None, renormalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = build(name, 0, sizes=(17, 9))
    if loss is None:
        data[0][1][2] = losses.IGNORED
    ev = smpq_ext.evaluator(model, data, bits=BITS, loss=loss, renormalize=renormalize)
    rows = random_assignments(ev, 5)
    of_labels = ev.by_group(rows)
    ev._losses_together = True
    np.testing.assert_array_equal(ev.by_group(rows), of_labels)
    monkeypatch.setattr(losses, "EACH", {})
    np.testing.assert_allclose(ev.by_group(rows), of_labels, rtol=1e-6)


@slow
@given(names, seeds, st.booleans())
def test_chunks_never_change_values(name: str, seed: int, renormalize: bool) -> None:
    model, data = build(name, seed, sizes=(17, 9, 1) if name != "Transposed" else (17, 9))
    wide, narrow = (
        smpq_ext.evaluator(model, data, bits=BITS, renormalize=renormalize, memory=memory) for memory in (None, 1)
    )
    assert narrow.rows_per_batch == 1
    assert name == "TimeFirst" or wide.rows_per_batch > 1
    rows = random_assignments(wide, 6, seed)
    together = wide(rows)
    # GELU and exp round by an element's place in the tensor; without them all would be bit-equal.
    np.testing.assert_allclose(narrow(rows), together, rtol=1e-6)
    np.testing.assert_allclose([wide(r[None])[0] for r in rows], together, rtol=1e-6)
    assert (wide(rows[[3, 3, 0]]) == wide(rows[[0, 3, 3]])[::-1]).all()


# --- what is found ----------


def test_slots_follow_execution_and_first_and_last_are_fixed() -> None:
    ev = smpq_ext.evaluator(*build("Branches", 0), bits=(8, 2, 4))
    assert list(ev.layers) == ["stem", "depth", "point", "left", "right", "head"]
    assert ev.slots[:4] == ("depth.weight", "depth.activation", "point.weight", "point.activation")
    assert {slot.name: width for slot, width in ev.space.fixed} == {
        f"{layer}.{kind}": 8 for layer in ("stem", "head") for kind in ("weight", "activation")
    }
    assert set(ev.space.candidates) == {(2, 4, 8)}
    depth = ev.space.slots[0]
    assert (depth.elements, depth.macs, depth.scales) == (72, 72 * 64, 8)
    assert ev.space.slots[1].elements == 8 * 64
    assert ev.grids["point.activation"][0].quant_max == 3  # after ReLU: unsigned from 0
    assert ev.grids["point.activation"][0].zero_point == 0
    assert ev.grids["head.activation"][0].zero_point > 0


def test_shared_modules_are_one_slot_and_shared_parameters_are_tied() -> None:
    ev = smpq_ext.evaluator(*build("Shared", 0), bits=BITS)
    assert ev.slots.count("twice.weight") == 1
    (pair,) = ev.space.tied
    assert [ev.slots[k] for k in pair] == ["one.weight", "other.weight"]
    assert [ev.space.slots[k].elements for k in pair] == [64, 0]
    assert ev.space.slots[0].macs == 2 * 64  # called twice
    ev = smpq_ext.evaluator(*build("Shared", 0), bits=BITS, fixed={"other": 4})
    assert {s.name: w for s, w in ev.space.fixed} == {"one.weight": 4, "other.weight": 4, "other.activation": 4}
    with pytest.raises(SmpqError, match="one Parameter"):
        smpq_ext.evaluator(*build("Shared", 0), bits=BITS, fixed={"one": 3, "other": 4})


def test_fixed() -> None:
    make = partial(smpq_ext.evaluator, *build("Shared", 0), bits=BITS)
    ev = make(fixed={"first": "float", "first.activation": 3})
    assert {s.name: w for s, w in ev.space.fixed} == {"first.weight": 32, "first.activation": 3}
    widths = ev.space.bits(ev.space.lowest())
    assert "first.weight" not in ev.grids_for(widths)
    assert ev.grids_for(widths)["first.activation"].quant_max == 7
    with pytest.raises(SmpqError, match="candidates"):
        ev.grids_for(widths | {"twice.weight": 5})
    assert len(make(fixed={}).slots) == 10
    weights_only = make(activation_bits=())
    assert {name.rpartition(".")[2] for name in weights_only.slots} == {"weight"}
    assert {w for s, w in weights_only.space.fixed if s.kind == "activation"} == {32}
    with pytest.raises(SmpqError, match="'nope' is no slot"):
        make(fixed={"nope": 8})
    with pytest.raises(SmpqError, match="width from 1 to 16"):
        make(fixed={"first": 17})
    with pytest.raises(SmpqError, match="fixed=\\{\\}"):
        smpq_ext.evaluator(nn.Linear(6, CLASSES), build("Shared", 0)[1], bits=BITS)


def test_the_model_itself_may_be_the_layer() -> None:
    ev = smpq_ext.evaluator(nn.Linear(6, CLASSES), build("Shared", 0)[1], bits=BITS, fixed={})
    assert ev.slots == (".weight", ".activation")
    np.testing.assert_allclose(ev(np.array([[2, 2]])), oracle(ev, ev.space.one_hot(np.array([[2, 2]]))[0]), rtol=1e-5)


class Leftovers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.rnn = nn.GRU(6, 6, batch_first=True)
        self.unused = nn.Linear(6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.inner, self.both, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.embed.weight[0]
        x = self.embed(torch.zeros(x.shape[:-1], dtype=torch.long)) + self.attention(x, x, x)[0]
        x = self.normed(self.rnn(x)[0])
        return self.out(F.linear(x, self.both.weight) + self.both(x) + self.inner(x)).mean(1)


def test_what_is_left_out_is_listed() -> None:
    x, y = torch.randn(6, 3, 6), torch.randint(0, CLASSES, (6,))
    ev = smpq_ext.evaluator(Leftovers(), [(x, y)], bits=BITS, fixed={})
    assert list(ev.layers) == ["inner", "out"]
    reasons = {
        "embed": "table", "attention": "not through forward", "attention.out_proj": "never ran", "rnn": "recurrent",
        "unused": "never ran", "normed": "parametrization", "(the model itself)": "linear directly",
        "both": "also used by another module",
    }  # fmt: skip
    assert set(reasons) <= set(ev.left_out)
    for name, reason in reasons.items():
        assert reason in ev.left_out[name]
    assert "matmul" in smpq_ext.evaluator(*build("Tokens", 0), bits=BITS).left_out["(the model itself)"]


def test_transformer_encoder_takes_no_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Flatten(), nn.Linear(24, CLASSES)).eval()
    ev = smpq_ext.evaluator(model, [(torch.randn(6, 3, 6), torch.randint(0, CLASSES, (6,)))], bits=(2, 8))
    assert {"1.linear1.weight", "1.linear2.activation"} <= set(ev.slots)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_cannot_fold_says_so() -> None:
    ev = smpq_ext.evaluator(*build("TimeFirst", 0), bits=BITS)
    assert ev.rows_per_batch == 1
    assert "one at a time" in ev.notes[0]
    assert smpq_ext.evaluator(*build("Branches", 0), bits=BITS).notes == ()


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def test_subclasses_run_their_own_forward() -> None:
    model = nn.Sequential(nn.Linear(6, 8), OwnForward(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    ev = smpq_ext.evaluator(model, build("Shared", 0)[1], bits=BITS, fixed={})
    rows = random_assignments(ev, 4)
    np.testing.assert_allclose(ev(rows), [oracle(ev, m) for m in ev.space.one_hot(rows)], rtol=1e-5)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_may_be_a_tuple_or_a_dict(form: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x * scale)}

    torch.manual_seed(0)
    x, scale, y = torch.randn(10, 6), torch.tensor([2.0]), torch.randint(0, CLASSES, (10,))
    inputs = (x, scale) if form == "tuple" else {"x": x, "scale": scale}
    model = Two()
    loss = lambda out, target: F.cross_entropy(out["logits"], target)  # noqa: E731
    ev = smpq_ext.evaluator(model, [(inputs, y)], bits=BITS, loss=loss)
    plain = smpq_ext.evaluator(model.net, [(x * scale, y)], bits=BITS)
    rows = random_assignments(ev, 3)
    np.testing.assert_allclose(ev(rows), plain(rows), rtol=1e-6)
    with pytest.raises(SmpqError, match="loss: cross-entropy wants outputs"):
        smpq_ext.evaluator(model, [(inputs, y)], bits=BITS)


# --- the model is only read ----------


def state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {k: (v.clone(), v.data_ptr(), v._version) for k, v in (*model.named_parameters(), *model.named_buffers())}
    flags = [
        (name, m.training, tuple(m._forward_hooks), tuple(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in model.named_modules()
    ]
    gradients = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return tensors, flags, gradients


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    pairs = zip(a[0].values(), b[0].values(), strict=True)
    return all(torch.equal(x[0], y[0]) and x[1:] == y[1:] for x, y in pairs) and a[1:] == b[1:]


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_model_is_untouched(renormalize: bool) -> None:
    model, data = build("Branches", 0)
    model.train()
    model.depth.eval()
    model.stem.register_forward_hook(lambda m, args, out: out)
    before, rng, grad = state(model), torch.get_rng_state(), torch.is_grad_enabled()
    ev = smpq_ext.evaluator(model, data, bits=BITS, renormalize=renormalize)
    ev(random_assignments(ev, 3))
    ev.statistics(ev.space.lowest())
    smpq_ext.apply(model, plan_of(ev, ev.space.lowest()))
    assert same(before, state(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad


def test_the_model_is_untouched_after_an_exception() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = build("Branches", 0)[0], [0]

        def forward(self, x: Tensor) -> Tensor:
            fails["count"] += 1
            if fails["count"] > fails["allowed"]:
                raise RuntimeError("the model is tired")
            if float(x.sum()) > 1e30:  # cannot be captured, so that every evaluation calls this forward
                return x
            return self.net(x)

    fails = {"count": 0, "allowed": 10**9}
    model, data = Fails().train(), build("Branches", 0)[1]
    before, rng = state(model), torch.get_rng_state()
    ev = smpq_ext.evaluator(model, data, bits=BITS)
    needed = fails["count"]
    rows = random_assignments(ev, 2)
    value = ev(rows)
    for allowed in range(needed):
        fails.update(count=0, allowed=allowed)
        try:
            smpq_ext.evaluator(model, data, bits=BITS)
        except (SmpqError, RuntimeError):
            assert same(before, state(model))
    fails.update(count=0, allowed=0)
    with pytest.raises(RuntimeError, match="tired"):
        ev(rows)
    assert same(before, state(model))
    assert torch.equal(rng, torch.get_rng_state())
    fails.update(count=0, allowed=10**9)
    assert (ev(rows) == value).all()  # and the evaluator still works


def test_parameters_take_no_second_memory() -> None:
    ev = smpq_ext.evaluator(*build("Shared", 0), bits=BITS)
    ours = {p.data_ptr() for p in ev._executor.model.parameters()}
    assert ours == {p.data_ptr() for p in ev.model.parameters()}


# --- renormalize, statistics, apply ----------


def plan_of(ev: Any, assignment: np.ndarray) -> smpq_ext.Plan:
    widths = ev.space.bits(assignment)
    return smpq_ext.Plan("test", 0, ev.fingerprint, widths, ev.grids_for(widths), ev.statistics(assignment))


@slow
@given(names, seeds, st.sampled_from(["auto", True, False]), st.booleans())
def test_the_applied_model_gives_the_value_searched(name: str, seed: int, renormalize: Any, some_float: bool) -> None:
    model, data = build(name, seed)
    fixed = {next(name for name, _ in model.named_children() if name != "embed"): "float"} if some_float else {}
    ev = smpq_ext.evaluator(model, data, bits=(1, *BITS), renormalize=renormalize, fixed=fixed)
    assert ev.renormalize == (renormalize is not False and name in ("Branches", "Transposed"))
    (assignment,) = random_assignments(ev, 1, seed)
    for group in ev.space.tied:
        assignment[list(group)] = assignment[group[0]]
    plan = plan_of(ev, assignment)
    assert bool(plan.statistics) == ev.renormalize
    applied = smpq_ext.apply(model, smpq_ext.Plan.from_json(plan.to_json()))
    with torch.no_grad():
        losses = [F.cross_entropy(applied(x).flatten(0, -2), y.flatten()).item() * len(x) for x, y in data]
    assert -sum(losses) / 20 == pytest.approx(ev(assignment[None])[0], rel=1e-5)
    assert -ev.loss_of(applied) == pytest.approx(ev(assignment[None])[0], rel=1e-5)


def test_the_applied_model_is_a_model() -> None:
    model, data = build("Branches", 3)
    ev = smpq_ext.evaluator(model, data, bits=BITS)
    applied = smpq_ext.apply(model, plan_of(ev, ev.space.lowest()))
    x = data[0][0]
    expected = applied(x)
    assert expected.dtype == torch.float32
    assert set(model.state_dict()) <= set(applied.state_dict())
    assert "depth.activation_quantizer.scale" in applied.state_dict()
    assert torch.equal(copy.deepcopy(applied)(x), expected)
    other = smpq_ext.apply(model, plan_of(ev, ev.space.highest()))
    blank = smpq_ext.apply(build("Branches", 4)[0], plan_of(ev, ev.space.lowest()))
    blank.load_state_dict(applied.state_dict())
    assert torch.equal(blank(x), expected)
    assert not torch.equal(other(x), expected)
    expected.sum().backward()  # straight-through
    assert applied.depth.weight.grad is not None
    compiled = torch.compile(applied, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected.detach())


def test_a_plan_for_another_model_is_refused() -> None:
    model, data = build("Branches", 0)
    ev = smpq_ext.evaluator(model, data, bits=BITS)
    plan = plan_of(ev, ev.space.lowest())
    with pytest.raises(SmpqError, match="no layer"):
        smpq_ext.apply(build("Shared", 0)[0], plan)
    other = copy.deepcopy(model)
    other.point = nn.Conv2d(8, 9, 1)
    shared, data = build("Shared", 0)
    ev = smpq_ext.evaluator(shared, data, bits=BITS)
    parted = ev.space.lowest()
    parted[ev.slots.index("other.weight")] = 1
    with pytest.raises(SmpqError, match="one Parameter"):
        smpq_ext.apply(shared, plan_of(ev, parted))
    with pytest.raises(SmpqError, match=r"point\.weight has 8 scales"):
        smpq_ext.apply(other, plan)
    other = copy.deepcopy(model)
    other.norm = nn.BatchNorm2d(9)
    with pytest.raises(SmpqError, match="no BatchNorm of 8"):
        smpq_ext.apply(other, plan)


def test_renormalize_needs_batches_of_one_shape() -> None:
    model, _ = build("Branches", 0)
    data = [(torch.randn(4, 3, s, s), torch.randint(0, CLASSES, (4,))) for s in (8, 10)]
    with pytest.raises(SmpqError, match="renormalize=False"):
        smpq_ext.evaluator(model, data, bits=BITS)
    ev = smpq_ext.evaluator(model, data, bits=BITS, renormalize=False)
    rows = random_assignments(ev, 2)
    np.testing.assert_allclose(ev(rows), [oracle(ev, m) for m in ev.space.one_hot(rows)], rtol=1e-5)


def test_a_norm_that_runs_twice_keeps_its_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.norm(self.b(F.relu(self.norm(self.a(x)))))))

    ev = smpq_ext.evaluator(Twice(), build("Shared", 0)[1], bits=BITS)
    assert not ev.renormalize
    assert "norm" in ev.notes[0]


@pytest.fixture(scope="module", params=[True, False], ids=["re-estimated", "kept"])
def evaluator(request: pytest.FixtureRequest) -> Any:
    return smpq_ext.evaluator(*build("Branches", 0), bits=BITS, renormalize=request.param)


class TestTorchEvaluator(EvaluatorContract):
    """Its contract."""


# --- losses, fingerprints ----------


def test_kl_is_zero_for_the_float_model_and_the_mean_over_positions() -> None:
    model, data = build("Tokens", 0)
    ev = smpq_ext.evaluator(model, [(x, None) for x, _ in data], bits=(2, 16), loss="kl", activation_bits=(), fixed={})
    assert ev.float_loss == pytest.approx(0, abs=1e-6)
    low, high = ev(np.stack([ev.space.lowest(), ev.space.highest()]))
    assert low < high <= 1e-6
    applied = smpq_ext.apply(model, plan_of(ev, ev.space.lowest()))
    with torch.no_grad():
        p, q = (F.log_softmax(torch.cat([m(x) for x, _ in data]), -1) for m in (model, applied))
    assert -low == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_a_default_dtype_of_the_users_changes_nothing() -> None:
    model, data = build("Branches", 0)
    expected = smpq_ext.evaluator(model, data, bits=BITS)
    rows = random_assignments(expected, 3)
    try:
        torch.set_default_dtype(torch.float64)
        ev = smpq_ext.evaluator(model, data, bits=BITS)
        np.testing.assert_array_equal(ev(rows), expected(rows))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_shuffling_loader_draws_nothing_from_the_user() -> None:
    model, data = build("Shared", 0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data[0]), batch_size=4, shuffle=True)
    before, python = torch.get_rng_state(), random.getstate()
    ev = smpq_ext.evaluator(model, loader, bits=BITS)
    assert torch.equal(before, torch.get_rng_state())
    assert python == random.getstate()
    assert len(ev.batches) == 3


class _Embedded(nn.Module):
    """A head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(ids))))


def test_what_shares_a_weight_with_a_layer_stays_float() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (2, 32, 7), generator=generator)
    model = _Embedded()
    result = smpq_ext.search(model, [(ids[0], ids[1])], bits=(2, 4), budget="weight-bits=3", fixed={}, method="single")
    applied = smpq_ext.apply(model, result.plan)
    assert torch.equal(applied.embed.weight, model.embed.weight)
    assert not torch.equal(applied.head.weight, model.head.weight)


class _Table(nn.Module):
    """A layer that is fed a table beside the batch."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table, self.last = nn.Linear(8, 16), nn.Linear(3, 16), nn.Linear(16, 5)
        self.register_buffer("given", torch.randn(rows, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.table(self.given).sum(0)))


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
def test_a_layer_whose_input_is_not_the_batch_runs_row_by_row(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(64, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator))]
    ev = smpq_ext.evaluator(_Table(rows), data, bits=(2, 8), activation_bits=(), fixed={})
    assignments = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]], np.int8)
    assert ev(assignments).tolist() == [ev(a[None])[0] for a in assignments]
    assert len(set(ev(assignments))) == 3 and any("one at a time" in note for note in ev.notes)


def test_a_model_that_works_in_place_leaves_the_data_alone() -> None:
    class InPlace(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(1.5))

    model = InPlace(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    x, y = torch.randn(32, 8), torch.randint(0, 5, (32,))
    before = x.clone()
    ev = smpq_ext.evaluator(model, [(x, y)], bits=(2, 8), fixed={})
    row = np.zeros((1, len(ev.slots)), np.int8)
    assert ev(row) == ev(row) == ev(row)
    assert torch.equal(x, before)


class Cumulative(nn.Module):
    """A sample sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).cumsum(0))


class Largest(Cumulative):
    """All samples see the largest of them."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        return self.b(hidden / hidden.max())


class Few(Cumulative):
    """No more than 64 samples, or other values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if x.shape[0] <= 64 else 0 * y


class Table(Cumulative):
    """No more than 64 samples, or an error."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + self.table[: len(x)]


@pytest.mark.parametrize("kind", [Cumulative, Largest, Few, Table])
def test_models_that_must_not_be_folded_run_one_coalition_at_a_time(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, data = kind(), [(torch.randn(64, 6), torch.randint(0, 5, (64,)))]
    ev = smpq_ext.evaluator(model, data, bits=(2, 4, 8), fixed={})
    assert "coalitions run one at a time" in " ".join(ev.notes)
    rows = np.random.default_rng(0).integers(0, 3, (5, len(ev.slots))).astype(np.int8)
    together = ev(rows)
    np.testing.assert_array_equal(together, [ev(row[None])[0] for row in rows])
    for row, value in zip(rows, together, strict=True):
        widths = ev.space.bits(row)
        plan = Plan("", 0, ev.fingerprint, widths, ev.grids_for(widths), {})
        assert -value == pytest.approx(ev.loss_of(smpq_ext.apply(model, plan)), rel=1e-5)


def test_layers_that_share_a_weight_share_its_grid() -> None:
    """Also where one of them follows a ReLU and the other does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    model[2].weight = model[0].weight
    ev = smpq_ext.evaluator(model, [(torch.randn(32, 16), torch.randint(0, 5, (32,)))], bits=(2, 3), fixed={})
    for one, other in zip(ev.grids["0.weight"], ev.grids["2.weight"], strict=True):
        assert (one.quant_min, one.quant_max) == (other.quant_min, other.quant_max)
        np.testing.assert_array_equal(one.scale, other.scale)
    row = ev.space.lowest()
    widths = ev.space.bits(row)
    plan = Plan("", 0, ev.fingerprint, widths, ev.grids_for(widths), {})
    assert -ev(row[None])[0] == pytest.approx(ev.loss_of(smpq_ext.apply(model, plan)), rel=1e-5)
