"""coalition_attention against its plain-torch twin in float64, and in the engine against gathered rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from smpq_ext import reference
from smpq_ext.engine.attention import Attention

pytestmark = pytest.mark.usefixtures("compiled")


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Odd sizes, strided views, rows in any order; scores small and large."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    samples, heads, rows = (draw(st.integers(1, 3)) for _ in range(3))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    size, value_size = draw(st.sampled_from([1, 5, 8, 24])), draw(st.sampled_from([1, 7, 8, 24]))
    spread = draw(st.sampled_from([0.1, 1.0, 10.0]))

    def tensor(tokens: int, width: int) -> tuple[Tensor, Tensor]:
        parents = draw(st.integers(1, 3))
        wide = spread * torch.randn(parents * samples, tokens, heads, width + 1, generator=generator)
        x = draw(st.sampled_from([wide[..., :width].transpose(1, 2), wide[..., 1:].transpose(1, 2).contiguous()]))
        return x, torch.randint(0, parents, (rows,), generator=generator)

    (q, q_row), (k, k_row), (v, v_row) = tensor(queries, size), tensor(keys, size), tensor(keys, value_size)
    return q, k, v, q_row, k_row, v_row, samples, draw(st.booleans()), float(size**-0.5)


@given(attentions())
def test_errors_are_at_most_twice_those_of_torch(arguments: tuple[Any, ...]) -> None:
    ours = torch.ops.smpq.coalition_attention(*arguments)
    q, k, v = (x.double() for x in arguments[:3])
    exact = reference.coalition_attention(q, k, v, *arguments[3:])
    theirs = reference.coalition_attention(*arguments)
    assert ours.shape == exact.shape and ours.transpose(1, 2).is_contiguous()
    error, other = ((x - exact).abs().max() for x in (ours, theirs))
    largest = (q.norm(dim=-1).max() * k.norm(dim=-1).max() * arguments[-1]).item()  # of a score: errs by its rounding
    assert error <= 2 * other + 1.2e-7 * (4 + largest) * v.abs().max()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    q, k, v = torch.randn(3, 6, 2, 33, 8)
    rows = torch.tensor([2, 0, 1])
    together = torch.ops.smpq.coalition_attention(q, k, v, rows, rows, rows, 2, True, 0.3).unflatten(0, (3, 2))
    for i, row in enumerate(rows):
        alone = torch.ops.smpq.coalition_attention(q, k, v, *[row[None]] * 3, 2, True, 0.3)
        assert torch.equal(together[i], alone)


def test_nan_and_infinity_come_out_where_they_are_seen() -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 8)
    k[0, 0, 5, 0] = torch.nan
    rows = [torch.zeros(1, dtype=torch.int64)] * 3
    out = torch.ops.smpq.coalition_attention(q, k, v, *rows, 1, True, 1.0)[0, 0]
    assert out[:5].isfinite().all() and out[5:].isnan().all()
    k[0, 0, 5, 0], v[0, 0, 20, 3] = 0, torch.inf
    out = torch.ops.smpq.coalition_attention(q, k, v, *rows, 1, False, 1.0)[0, 0]
    assert out[:, 3].isposinf().all() and out[:, [0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def example() -> list[Any]:
    rows = torch.tensor([1, 0, 1])
    return [*torch.randn(3, 4, 2, 5, 8), rows, rows, rows, 2, True, 0.5]


def test_opcheck(opcheck: Any) -> None:
    opcheck(torch.ops.smpq.coalition_attention.default, tuple(example()))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(4, 2, 5, 8).double(), "q .* must be float32"),
        (0, torch.randn(3, 2, 5, 8), r"q .* \[rows \* 2"),
        (1, torch.randn(4, 1, 5, 8), "as many heads"),
        (1, torch.randn(4, 2, 5, 7), "size of q"),
        (2, torch.randn(4, 2, 4, 8), "tokens of v"),
        (3, torch.tensor([0, 2, 0]), r"q_row\[1\] is 2"),
        (4, torch.tensor([0, 1]), "k_row"),
        (6, 0, "samples"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(position: int, value: Any, message: str) -> None:
    arguments = example()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.smpq.coalition_attention(*arguments)


class Attends(nn.Module):
    """Queries, keys and values of layers of their own, in windows of tokens; the settings of one attention."""

    def __init__(self, window: int = 9, **settings: Any) -> None:
        super().__init__()
        self.window = window
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.window)).flatten(0, 1)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, **self.settings).transpose(1, 2).flatten(2)
        return self.out(y.reshape(-1, 9, 16)).mean(1)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({}, True),
        ({"is_causal": True, "scale": 0.7}, True),
        ({"window": 3}, True),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}, False),
    ],
    ids=["plain", "causal", "windows", "mask"],
)
def test_the_engine_gathers_nothing_and_finds_the_same(
    settings: dict[str, Any], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Attends(**settings), torch.randn(16, 9, 16)
    data = [(x, torch.randint(0, 16, (16,)))]
    ev = smpq_ext.evaluator(model, data, bits=(8, 10), fixed={})
    lockstep = ev._executor.lockstep
    assert lockstep is not None and len(lockstep.attentions) == ours
    calls: list[int] = []
    run = Attention.__call__

    def counted(self: Attention, values: Any, rows: tuple[Tensor, ...], samples: int) -> Tensor:
        calls.append(len(rows[0]))
        return run(self, values, rows, samples)

    monkeypatch.setattr(Attention, "__call__", counted)
    rows = np.random.default_rng(0).integers(0, 2, (40, len(ev.slots))).astype(np.int8)
    found = ev(rows)
    assert bool(calls) == ours
    lockstep.attentions = {}
    np.testing.assert_allclose(found, ev(rows), rtol=1e-4)


def test_the_fingerprint_tells_whether_attention_rounds_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Attends(), [(torch.randn(8, 9, 16), torch.randint(0, 16, (8,)))]
    ours = smpq_ext.evaluator(model, data, bits=(4, 8)).fingerprint
    assert smpq_ext.evaluator(model, data, bits=(4, 8)).fingerprint == ours
    monkeypatch.setattr("smpq_ext.engine.attention.find", lambda graph: {})
    assert smpq_ext.evaluator(model, data, bits=(4, 8)).fingerprint != ours
