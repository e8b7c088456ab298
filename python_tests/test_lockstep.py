"""Lockstep: the planner's rows, what can be captured, and that sharing changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import MODELS, build
from torch import Tensor, nn

import smpq_ext
from smpq_ext import _C

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
        if columns:
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
    ev._executor.load(ev._by_slot(ev.space.one_hot(chain)), dict(zip(ev.slots, chain.T.astype(np.int64), strict=True)))
    counts = [len(rows.coalition) for rows in lockstep.rows]
    assert counts == list(range(1, n + 2))
