"""Lockstep: the planner's rows, what can be captured, and that sharing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import odd_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import MODELS, build
from torch import Tensor, nn

import smpq_ext
from smpq_ext import _C
from smpq_ext.core import Plan, SmpqError
from smpq_ext.engine.memory import Meter

pytestmark = pytest.mark.usefixtures("compiled")


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], np.ndarray]:
    """Places that read earlier ones and columns, and the choices of n coalitions."""
    columns = draw(st.integers(1, 5))
    places: list[tuple[list[int], list[int]]] = [([], [])]
    for p in range(1, draw(st.integers(2, 9))):
        inputs = draw(st.lists(st.integers(0, p - 1), min_size=1, max_size=3, unique=True))
        places.append((inputs, draw(st.lists(st.integers(0, columns - 1), max_size=2, unique=True))))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return places, rng.integers(0, 3, (draw(st.integers(1, 12)), columns)).astype(np.int32)


@given(graphs())
def test_a_row_is_a_distinct_choice_in_the_columns_before_a_place(given_: Any) -> None:
    places, choices = given_
    before: list[set[int]] = []
    for (inputs, columns), (row, coalition) in zip(places, _C.plan(places, choices), strict=True):
        before.append(set(columns).union(*(before[p] for p in inputs)))
        restricted = choices[:, sorted(before[-1])]
        assert sorted(row[coalition]) == list(range(len(coalition)))  # every row has a coalition of its own
        same_row = row[:, None] == row[None]
        same_choice = (restricted[:, None] == restricted[None]).all(axis=2)
        assert (same_row == same_choice).all()
        if len(coalition) == len(choices):
            assert (row == np.arange(len(choices))).all()
        elif columns:
            assert (np.diff(choices[coalition[np.argsort(row[coalition])], columns[-1]]) >= 0).all()


def test_the_planner_refuses_what_is_out_of_range() -> None:
    choices = np.zeros((2, 1), np.int32)
    with pytest.raises(RuntimeError, match="earlier"):
        _C.plan([([0], [])], choices)
    with pytest.raises(RuntimeError, match="column"):
        _C.plan([([], [1])], choices)
    with pytest.raises(ValueError, match="columns"):
        _C.plan([([], [])], choices[0])


@settings(max_examples=20)
@pytest.mark.slow
@given(st.sampled_from(sorted(set(MODELS) - {"TimeFirst"})), st.integers(0, 100), st.booleans())
def test_lockstep_is_the_swapped_model_bit_for_bit(name: str, seed: int, renormalize: bool) -> None:
    model, data = build(name, seed)
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 8), renormalize=renormalize, fixed={})
    lockstep = ev._executor.lockstep
    assert lockstep is not None and not ev.notes[1:]
    lockstep.integer, lockstep.floating, lockstep.attentions = None, None, {}  # what adds in an order of its own
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, ev.space.highest() + 1, (3, len(ev.slots)))
    chain = np.repeat(rows, 3, axis=0)
    chain[1::3, -1], chain[2::3, 0] = 0, 0  # rows that share nearly all, and nearly nothing
    mixtures = ev.space.one_hot(chain)
    mixtures[:, 1] = ev.space.mask[1] / 3  # so that none is an assignment
    shared = ev.by_group(mixtures)
    ev._executor.lockstep = None
    swapped = ev.by_group(mixtures)
    # torch's element-wise functions may round by the place in memory; all else is the same arithmetic.
    np.testing.assert_allclose(shared, swapped, rtol=1e-6)


@pytest.mark.parametrize("name", ["Tokens", "Shared", "Branches"])
def test_weights_alone_are_multiplied_where_their_parents_stand(name: str) -> None:
    model, data = build(name, 0)
    settings = {"bits": (2, 3, 8), "activation_bits": (), "fixed": {}, "renormalize": False}
    ev = smpq_ext.evaluator(model, data, **settings)
    assert ev._executor.lockstep is not None
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (9, len(ev.slots))).astype(np.int8)
    rows[3:6, :-1] = rows[3, :-1]  # that share all but the last weight
    shared = ev.by_group(rows)
    ev._executor.lockstep = None
    np.testing.assert_allclose(shared, ev.by_group(rows), rtol=1e-6)


class Wanders(nn.Module):
    """Control flow on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y if float(y.abs().max()) > 1e30 else y.relu())


class OtherWeight(nn.Linear):
    """A layer that multiplies by something else than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


OTHER = nn.Sequential(OtherWeight(6, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize("model", [Wanders(), OTHER], ids=["if", "own"])
def test_what_cannot_be_captured_runs_by_itself_and_says_so(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(16, 6), torch.randint(0, 3, (16,)))]
    ev = smpq_ext.evaluator(model, data, bits=(2, 8), fixed={})
    assert ev._executor.lockstep is None
    assert sum("cannot capture" in note for note in ev.notes) == 1
    assert np.isfinite(ev(np.zeros((2, len(ev.slots)), np.int8))).all()
    smpq_ext.search(model, data, bits=(2, 8), fixed={}, budget="weight-bits=4", method="uniform")
    assert sum("cannot capture" in record.getMessage() for record in caplog.records) == 1


def test_chains_compute_what_their_rows_share_once() -> None:
    model = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    ev = smpq_ext.evaluator(model, [(torch.randn(16, 8), torch.randint(0, 3, (16,)))], bits=(2, 8), fixed={})
    n = len(ev.slots)
    chain = np.tri(n + 1, n, -1, dtype=np.int8)[:, ::-1]  # one slot more at a time, the last ones first
    lockstep = ev._executor.lockstep
    with ev._executor.loaded(ev.space.one_hot(chain)):
        counts = [len(rows.coalition) for rows in lockstep.rows]
    assert counts == list(range(1, n + 2))


def first_output(outputs: Any, targets: Tensor) -> Tensor:
    """Cross-entropy of a model's first output."""
    return nn.functional.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, targets)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("name", odd_models.MODELS)
def test_odd_models_have_the_values_of_a_plain_loop(name: str, renormalize: bool) -> None:
    """Assignments in integers, mixtures in floating point, whether or not the model could be captured."""
    model, data = odd_models.build(name)
    if renormalize and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        pytest.skip("no BatchNorm")
    ev = smpq_ext.evaluator(model, data, bits=(3, 8), loss=first_output, fixed={}, renormalize=renormalize)
    assert (ev._executor.lockstep is None) == (name in odd_models.FALL_BACK), ev.notes
    assert odd_models.FALL_BACK.get(name, "") in " ".join(ev.notes)
    rng = np.random.default_rng(0)
    rows = np.concatenate([ev.space.lowest()[None], ev.space.highest()[None], rng.integers(0, 2, (5, len(ev.slots)))])
    for row, value in zip(rows, ev(rows.astype(np.int8)), strict=True):
        widths = ev.space.bits(row.astype(np.int8))
        plan = Plan("", 0, ev.fingerprint, widths, ev.grids_for(widths), ev.statistics(row.astype(np.int8)))
        assert -value == pytest.approx(ev.loss_of(smpq_ext.apply(model, plan)), rel=2e-3)
    assert (name == "weight_used_elsewhere") == ("b" in ev.left_out)
    mixtures = ev.space.one_hot(rows)
    mixtures[:, 0] = 0.5
    values = ev.by_group(mixtures)
    ev._executor.lockstep = None
    np.testing.assert_allclose(values, ev.by_group(mixtures), rtol=1e-5)


def test_a_block_of_a_residual_network_is_two_calls() -> None:
    model, data = odd_models.build("residual_blocks")
    for renormalize in (False, True):
        ev = smpq_ext.evaluator(model, data, bits=(3, 8), fixed={}, renormalize=renormalize)
        lockstep = ev._executor.lockstep
        fused = list(lockstep.integer.fused.values())
        assert [f.norm is not None for f in fused] == [False, *[True] * 4, False]
        assert [f.residual is not None for f in fused] == [False, False, True, False, True, False]
        assert [f.low for f in fused] == [0, 0, 0, 0, 0, -np.inf]
        left = {
            step.target
            for k, step in enumerate(lockstep.graph.steps)
            if k not in lockstep.integer.absorbed and k not in lockstep.integer.fused and step.place is not None
        }
        assert torch.ops.aten.add.Tensor not in left and torch.ops.aten.relu.default not in left


def test_what_ends_a_layer_is_part_of_its_call() -> None:
    """Also where branches meet that have choices of their own."""
    gelu_tanh, silu, hardswish = 2, 3, 4
    expected = {
        "gated": [("a", silu, ""), ("b", 0, "*"), ("c", 0, "+"), ("d", gelu_tanh, ""), ("f", hardswish, "")],
        "normed_shortcut": [("a", 0, ""), ("b", 0, "+"), ("d", 0, ""), ("f", 0, "")],
    }
    for name, calls in expected.items():
        model, data = odd_models.build(name)
        for mixed in (False, True):
            lockstep = smpq_ext.evaluator(model, data, bits=(3, 8), fixed={})._executor.lockstep
            fused = (lockstep.floating if mixed else lockstep.integer).fused.values()
            found = [
                (f.layer.layer.name, f.activation, "" if f.residual is None else "+*"[f.multiplies]) for f in fused
            ]
            assert set(calls) <= set(found)


def test_grouped_convolutions_run_on_codes() -> None:
    model, data = odd_models.build("grouped")
    lockstep = smpq_ext.evaluator(model, data, bits=(3, 8), fixed={})._executor.lockstep
    assert len(lockstep.integers) == 6


@pytest.mark.parametrize("shape", [(6,), (5, 6), (6, 5, 5)])
def test_nan_stays_where_it_is(shape: tuple[int, ...]) -> None:
    """Rows and samples whose outputs are NaN are those of the model itself."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = (lambda: nn.Conv2d(6, 6, 1, bias=False)) if len(shape) == 3 else lambda: nn.Linear(6, 6, bias=False)
            self.a, self.b = layer(), layer()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y / y.abs().sum(tuple(range(1, y.dim())), keepdim=True))

    torch.manual_seed(0)
    x = torch.randn(9, *shape)
    x[[2, 5]] /= 50  # all zeros at two bits

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.nan_to_num().square().mean()

    ev = smpq_ext.evaluator(Divides(), [(x, torch.zeros(9))], bits=(2, 8), fixed={}, loss=loss)
    rows = ev.space.one_hot(np.array([[1] * len(ev.slots), [0] * len(ev.slots), [1] * len(ev.slots)], np.int8))
    with ev._executor.loaded(rows):
        ours = ev._executor.forward(ev.batches[0], 0, 9)
    with ev._executor.loaded(rows, assigned=False):
        theirs = ev._executor.forward(ev.batches[0], 0, 9, ev._executor.model)
    broken = ours.unflatten(0, (3, 9)).flatten(2).isnan().all(2)
    assert torch.equal(broken, theirs.unflatten(0, (3, 9)).flatten(2).isnan().any(2))
    assert broken.any() and not broken.all()


@pytest.mark.parametrize("residual", [False, True])
def test_nan_between_two_integer_layers_is_an_error_that_names_its_row(residual: bool) -> None:
    """Codes cannot be NaN: what a floating step makes of it must not be forgotten."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
            self.c = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y / y.abs().sum(1, keepdim=True)
            return self.c(self.b(y.nan_to_num()) + y if residual else self.b(y))

    torch.manual_seed(0)
    x = torch.randn(16, 6)
    x[5] /= 20  # all zeros at two bits
    ev = smpq_ext.evaluator(Divides(), [(x, torch.randint(0, 4, (16,)))], bits=(2, 8), fixed={})
    assert any(f.residual is not None for f in ev._executor.lockstep.integer.fused.values()) == residual
    rows = np.ones((3, len(ev.slots)), np.int8)
    rows[1, 0] = 0
    assert np.isfinite(ev(rows[[0, 2]])).all()
    rows[2, ev.slots.index("a.activation")] = 0
    with pytest.raises(SmpqError, match=r"loss: the loss of row 2, a.activation at 2 bits, is nan; .* NaN .* leaves"):
        ev(rows)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("limit", [1 << 20, 1 << 23, 1 << 25])
def test_memory_stays_under_the_limit(limit: int, renormalize: bool) -> None:
    """All that torch allocates for a chunk, measured; the limit cannot be below what one row of few samples takes."""
    model, data = build("Branches", 0, sizes=(64,))
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 8), memory=limit, renormalize=renormalize, fixed={})
    rng = np.random.default_rng(0)
    rows = rng.integers(0, ev.space.highest() + 1, (300, len(ev.slots))).astype(np.int8)
    mixtures = ev.space.one_hot(rows)
    mixtures[:, 1] = ev.space.mask[1] / 3
    least = 0
    for given_ in (rows, mixtures):
        with Meter() as meter:
            ev(given_[:1])
        least = max(least, meter.peak)
        with Meter() as meter:
            ev(given_)
        assert meter.peak <= max(limit, least)
        assert meter.peak <= max(ev.peak_bytes, least)
