"""When an attribution says enough, besides the end of its budget; never by the clock, which would break replay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smpq_ext.core import Assignments, Attribution, Values

CERTAIN = 1.96  # standard errors of an interval of 95 %


def separated(found: Attribution) -> bool:
    """Whether the 95 % interval of every player leaves out 0: of what each step of width is worth the sign is known.

    Each interval is one of 95 % by itself; many players, and looking again and again, are not allowed for.
    """
    return bool((np.abs(found.values) > CERTAIN * found.standard_errors).all())


def stable(
    found: Attribution,
    plan_of: Callable[[Values], Assignments],
    rng: np.random.Generator,
    share: float = 0.95,
    resamples: int = 40,
) -> bool:
    """Whether `plan_of(values)` is the same in a share of parametric bootstrap resamples of the values.

    Source: Efron and Tibshirani, An introduction to the bootstrap (1993), section 6.5; values are drawn from normal
    distributions of their standard errors, and it is over once too many differ.
    """
    if not np.isfinite(found.standard_errors).all():
        return False
    plan, differ = plan_of(found.values), 0
    for _ in range(resamples):
        drawn = found.values + found.standard_errors * rng.standard_normal(len(found.values))
        differ += not np.array_equal(plan_of(drawn), plan)
        if differ > (1 - share) * resamples:
            return False
    return True
