"""Results made by hand, for tests of what shows them."""

import numpy as np

from smpq_ext.core import FLOAT_BITS, Attribution, Plan, Result, Slot, Space


def a_result(layers=6, bits=(2, 3, 4, 6, 8), names=None, seed=0):
    """A result with scores, errors, attribution and trace, for `layers` searched layers and two fixed slots."""
    rng = np.random.default_rng(seed)
    names = names or [f"stage{i // 4}.{i % 4}.conv" for i in range(layers)]
    slots = tuple(
        Slot(name, kind, 64 * (i + 1), 4096 * (i + 1), 8)
        for i, name in enumerate(names)
        for kind in ("weight", "activation")
    )
    fixed = ((Slot("head", "weight", 640, 640, 10), 8), (Slot("head", "activation", 64, 640, 1), FLOAT_BITS))
    space = Space(slots, (tuple(bits),) * len(slots), fixed)
    scale = 10 ** rng.uniform(-3, 0, (len(slots), 1))
    scores = scale * 4.0 ** -np.arange(len(bits)) * (np.arange(len(bits)) < len(bits) - 1)
    errors = 0.1 * scores
    assignment = rng.integers(0, len(bits), len(slots))
    trace = tuple((float(p), float(p * rng.uniform(0.9, 1.3))) for p in 0.2 + rng.random(80))
    return Result(
        plan=Plan("shapley", seed, "f" * 64, space.bits(assignment)),
        space=space,
        budget={"weight-bits": 3.0},
        cost={"weight-bits": 2.97, "activation-bits": 4.1, "bytes": 31204.0, "bitops": 0.0712},
        attribution=Attribution(scores[:, 0] * rng.uniform(0.5, 1.5, len(slots)), errors[:, 0], 240),
        scores=scores,
        score_errors=errors,
        predicted_loss=0.4321,
        measured_loss=0.4567,
        float_loss=0.1234,
        trace=trace,
        finding="additive within noise",
        evaluations=1234,
        seconds={"calibrate": 1.5, "search": 20.25, "verify": 0.1},
        peak_bytes=123 << 20,
        left_out={"embedding": "an embedding is a table look-up, its weight stays float"},
    )
