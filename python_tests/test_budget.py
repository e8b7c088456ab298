import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smpq_ext.budget import KINDS, costs, parse
from smpq_ext.core import FLOAT_BITS, Slot, SmpqError, Space


def slot(layer, kind, elements=100, macs=1000, scales=1):
    return Slot(layer, kind, elements, macs, scales)


# stem: fixed at 8, activation float; a: both searched; b: weight searched, activation fixed at 8;
# c: activation searched, weight fixed at 4; d: weight searched, activation not quantized; head: all float
SPACE = Space(
    slots=(
        slot("a", "weight", 100, 1000, 10),
        slot("a", "activation", 7, 1000),
        slot("b", "weight", 300, 2000, 30),
        slot("c", "activation", 5, 500),
        slot("d", "weight", 100, 50, 1),
    ),
    candidates=((2, 3, 4, 8), (2, 4, 8), (2, 8), (4, 8), (2, 4, 6, 8)),
    fixed=(
        (slot("stem", "weight", 20, 100, 2), 8),
        (slot("b", "activation", 9, 2000), 8),
        (slot("c", "weight", 40, 500, 4), 4),
        (slot("head", "weight", 10, 30, 1), FLOAT_BITS),
        (slot("head", "activation", 10, 30), FLOAT_BITS),
    ),
    tied=((2, 4),),
)
ASSIGNMENTS = st.tuples(*(st.integers(0, len(c) - 1) for c in SPACE.candidates))


@given(ASSIGNMENTS)
def test_costs_are_what_the_words_say(assignment):
    found = costs(SPACE, np.array(assignment, np.int8))
    a, xa, b, xc, d = (c[i] for c, i in zip(SPACE.candidates, assignment, strict=True))
    weights = (100 * a + 300 * b + 100 * d) / 500
    held = 100 * a / 8 + 40 + 300 * b / 8 + 120 + 100 * d / 8 + 4 + 20 + 8 + 40 * 4 / 8 + 16 + 10 * 4
    operations = 1000 * a * xa + 2000 * b * 8 + 500 * 4 * xc + 50 * d * 32 + 100 * 8 * 32 + 30 * 32 * 32
    assert found == pytest.approx(
        {
            "weight-bits": weights,
            "activation-bits": (xa + xc) / 2,
            "bytes": held,
            "bitops": operations / (64 * (1000 + 2000 + 500 + 50 + 100 + 30)),
        }
    )


@given(ASSIGNMENTS, st.sampled_from(KINDS), st.floats(0.01, 10000))
def test_feasible_is_cost_at_most_limit(assignment, kind, level):
    row = np.array(assignment, np.int8)
    budget = parse(f"{kind}={level!r}", SPACE)
    assert budget.tied == SPACE.tied
    (limit,) = budget.limits
    assert (limit.name, limit.limit) == (kind, level)
    cost = costs(SPACE, row)[kind]
    assert limit.cost(row)[0] == cost
    tied = assignment[2] == assignment[4]
    if abs(cost - level) > 1e-6:
        assert budget.feasible(row)[0] == (tied and cost < level)


def test_eight_bits_everywhere_is_one():
    every = Space(SPACE.slots[:2], ((2, 8), (2, 8)))
    assert costs(every, every.highest())["bitops"] == 1


def test_several_limits_keep_their_order_and_spaces_do_not_matter():
    budget = parse(" bytes = 250000 , weight-bits=3,bitops=1e-1", SPACE)
    assert [(li.name, li.limit) for li in budget.limits] == [("bytes", 250000), ("weight-bits", 3), ("bitops", 0.1)]


def test_candidates_that_do_not_exist_cost_infinity():
    for kind in KINDS:
        (limit,) = parse(f"{kind}=3", SPACE).limits
        assert (limit.table[~SPACE.mask] == np.inf).all()
        assert np.isfinite(limit.table[SPACE.mask]).all()
        for product in limit.products:
            assert np.isfinite(product.cost[np.ix_(SPACE.mask[product.first], SPACE.mask[product.second])]).all()


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "bits=3", "weight-bits", "weight-bits=", "weight-bits=three", "weight-bits=0", "weight-bits=-1",
        "weight-bits=nan", "weight-bits=inf", "weight-bits=3,weight-bits=4", "weight-bits=3,", "=3", "weight_bits=3",
        "weight-bits:3", "bytes=250 kB",
    ],
)  # fmt: skip
def test_anything_else_is_refused_on_one_line(text):
    with pytest.raises(SmpqError) as caught:
        parse(text, SPACE)
    message = str(caught.value)
    assert message.startswith("budget: ") and "\n" not in message
    assert text.split(",")[-1] in message


def test_an_unknown_kind_is_told_the_known_ones():
    with pytest.raises(SmpqError, match="weight-bits, activation-bits, bytes, bitops"):
        parse("latency=3", SPACE)


def test_a_number_is_refused_like_a_text():
    with pytest.raises(SmpqError, match="budget"):
        parse(3, SPACE)


@pytest.mark.parametrize("kind", ["activation-bits"])
def test_a_limit_without_slots_is_refused_and_left_out_of_the_costs(kind):
    weights = Space(SPACE.slots[:1], SPACE.candidates[:1])
    with pytest.raises(SmpqError, match="limits nothing"):
        parse(f"{kind}=3", weights)
    assert set(costs(weights, weights.lowest())) == set(KINDS) - {kind}
    activations = Space(SPACE.slots[1:2], SPACE.candidates[1:2])
    for other in ("weight-bits", "bytes"):
        with pytest.raises(SmpqError, match="limits nothing"):
            parse(f"{other}=3", activations)
    assert set(costs(activations, activations.lowest())) == {"activation-bits", "bitops"}
