"""How the calibration samples are cut: groups, parts, halves, and the few that derivatives are taken on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import smpq_ext
from python_tests.plain_loop import oracle, random_assignments
from python_tests.random_models import MODELS, build
from smpq_ext.core import SmpqError

BITS = (2, 3, 8)
slow = settings(max_examples=16, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
names = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 10_000)


@pytest.mark.parametrize("sizes", [(20,), (12, 8), (3, 2, 4), (1,) * 30, (2,) * 11])
def test_groups_and_losses_of_parts(sizes: tuple[int, ...]) -> None:
    model, data = build("Shared", 0, sizes)
    ev = smpq_ext.evaluator(model, data, bits=BITS)
    assert ev.groups.sum() == pytest.approx(1)
    assert 4 <= len(ev.groups) <= 16
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return F.cross_entropy(outputs, targets)

    own = smpq_ext.evaluator(model, data, bits=BITS, loss=loss)
    assert sum(seen) == sum(sizes)
    assert own.float_loss == pytest.approx(ev.float_loss)


@slow
@given(names, seeds, st.floats(0.1, 0.9), st.booleans())
def test_split_parts_the_samples_and_shares_the_grids(name: str, seed: int, fraction: float, renormalize: bool) -> None:
    model, data = build(name, seed)
    ev = smpq_ext.evaluator(model, data, bits=BITS, renormalize=renormalize)
    search, apart = ev.split(fraction, np.random.default_rng(seed))
    sizes = [sum(b.size for b in part.batches) for part in (search, apart)]
    assert sizes == [20 - round(20 * fraction), round(20 * fraction)]
    assert len({ev.fingerprint, search.fingerprint, apart.fingerprint}) == 3
    assert search.grids is ev.grids
    again, _ = ev.split(fraction, np.random.default_rng(seed))
    assert again.fingerprint == search.fingerprint
    total = sizes[0] * search.float_loss + sizes[1] * apart.float_loss
    assert total / 20 == pytest.approx(ev.float_loss, rel=1e-5)
    rows = random_assignments(ev, 2, seed)
    for part in (search, apart):
        if part.batches and name != "TimeFirst":
            expected = [oracle(part, m) for m in ev.space.one_hot(rows)]
            np.testing.assert_allclose(part(rows), expected, rtol=1e-4, atol=1e-5)


def test_split_needs_samples() -> None:
    for fraction, needed in ((0.2, 3), (0.25, 3), (0.4, 2)):
        few, enough = (smpq_ext.evaluator(*build("Shared", 0, (n,)), bits=BITS) for n in (needed - 1, needed))
        with pytest.raises(SmpqError, match=f"give at least {needed} samples"):
            few.split(fraction, np.random.default_rng(0))
        assert enough.split(fraction, np.random.default_rng(0))
    with pytest.raises(SmpqError, match="fraction: a number between 0 and 1"):
        few.split(1.0, np.random.default_rng(0))


@pytest.mark.parametrize("renormalize", [True, False])
def test_derivatives_are_slopes_where_the_network_is_smooth_in_its_weights(renormalize: bool) -> None:
    """Of weights only, no rounding is passed through on the way from a mixture to the loss."""
    model, data = build("Branches", 0)
    ev = smpq_ext.evaluator(model, data, bits=(2, 4), activation_bits=(), renormalize=renormalize, fixed={})
    mixture = np.full((1, *ev.space.mask.shape), 0.5, np.float32)
    found = ev.derivatives(mixture)[0]
    for slot in range(len(ev.slots)):
        ends = np.repeat(mixture, 2, axis=0)
        ends[:, slot] += np.array([[-0.01, 0.01], [0.01, -0.01]], np.float32)
        low, high = ev(ends)
        assert (high - low) / 0.02 == pytest.approx(found[slot, 0] - found[slot, 1], rel=0.1, abs=2e-4)


def test_derivatives_are_of_a_few_samples_spread_over_the_batches() -> None:
    model, data = build("Branches", 0, (150, 50))
    ev = smpq_ext.evaluator(model, data, bits=(2, 4), activation_bits=(), renormalize=False)
    few = [(x[first::7], y[first::7]) for first, (x, y) in zip((0, 4), data, strict=True)]  # at most 32 of 200
    other = smpq_ext.evaluator(model, few, bits=(2, 4), activation_bits=(), renormalize=False)
    mixture = np.full((1, *ev.space.mask.shape), 0.5, np.float32)
    np.testing.assert_allclose(ev.derivatives(mixture), other.derivatives(mixture), rtol=1e-5)


def test_a_loss_without_gradient_has_derivatives_of_zero() -> None:
    model, data = build("Branches", 0)

    def mistakes(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) != targets).float().mean()

    ev = smpq_ext.evaluator(model, data, bits=(2, 4), loss=mistakes)
    assert (ev.derivatives(np.full((1, *ev.space.mask.shape), 0.5, np.float32)) == 0).all()


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
@pytest.mark.parametrize("sizes", [(16,), (12, 7, 5)])
def test_parts_apply_the_loss_to_the_pieces_that_groups_are(loss: Any, sizes: tuple[int, ...]) -> None:
    """A mean over labels that are not ignored is no mean over samples: other pieces would give other values."""
    model, data = build("Branches", 0, sizes)
    data = [(x, y.clone()) for x, y in data]
    data[0][1][[0, 1, 5] if loss is None else [0, 3, 5]] = -100  # a whole group, where it can be ignored
    ev = smpq_ext.evaluator(model, data, bits=(2, 4), renormalize=False, loss=loss)
    rows = np.stack([ev.space.lowest(), ev.space.highest()])
    of_groups = ev.by_group(rows)
    for most in (2, 3, 100):
        parts = ev.parts(most)
        assert len(parts) > 1 and sum(share for share, _ in parts) == pytest.approx(1)
        found = sum(share * part(rows) for share, part in parts)
        np.testing.assert_allclose(found, of_groups @ ev.groups, rtol=1e-6)


def test_where_there_is_no_backward_pass_derivatives_are_zero_and_the_random_state_stays() -> None:
    model, data = build("Branches", 0)

    def numpy_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.from_numpy(np.square(outputs.numpy())).mean()

    mixture = None
    for loss in (numpy_loss, None):
        ev = smpq_ext.evaluator(model, data, bits=(2, 4), loss=loss)
        mixture = np.full((1, *ev.space.mask.shape), 0.5, np.float32)
        before = torch.get_rng_state()
        assert bool(ev.derivatives(mixture).any()) == (loss is None)
        assert torch.equal(torch.get_rng_state(), before)


def test_groups_that_depend_on_other_samples_are_no_parts() -> None:
    model, data = build("Branches", 0)
    ev = smpq_ext.evaluator(model, data, bits=BITS, renormalize=True)
    assert len(ev.groups) > 1 and ev.parts(8) == ((1.0, ev),)
