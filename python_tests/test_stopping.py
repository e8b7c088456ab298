import numpy as np
import pytest

from smpq_ext import stopping
from smpq_ext.core import Attribution


def found(values, errors):
    return Attribution(np.array(values, np.float64), np.array(errors, np.float64), 10)


@pytest.mark.parametrize(
    ("errors", "expected"), [([0.1, 0.1], True), ([0.1, 1.1], False), ([0, 0], True), ([0.1, np.inf], False)]
)
def test_intervals_that_leave_out_zero(errors, expected):
    assert stopping.separated(found([1.0, -2.0], errors)) is expected


@pytest.mark.parametrize(("error", "often"), [(0.1, 1.0), (0.6, None), (5.0, 0.0), (np.inf, 0.0)])
def test_a_plan_is_stable_as_often_as_resamples_agree(error, often):
    """The plan is the order of two values that differ by 1: it turns over with the probability of a normal tail."""
    runs = [
        stopping.stable(found([1.0, 0.0], [error, 0.0]), np.argsort, np.random.default_rng(seed)) for seed in range(200)
    ]
    if often is None:  # P(turned) = 0.048: about half of the runs see at most 2 of 40
        assert 0.4 < np.mean(runs) < 0.9
    else:
        assert np.mean(runs) == often
