"""Every method that the registry finds, on a small trained network: budget, replay, evaluations, and what it is for."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contracts import MethodContract
from torch import nn
from torch.nn import functional as F

import smpq_ext
from smpq_ext import registry
from smpq_ext.budget import parse
from smpq_ext.core import Answer, Infeasible, Problem, SmpqError
from smpq_ext.engine.evaluator import evaluator
from smpq_ext.methods.shapley import Shapley
from smpq_ext.methods.single import Single, score_singles
from smpq_ext.solvers.milp import Milp
from smpq_ext.store import MemoryStore, Recorded

BITS = (2, 3, 4, 8)
BUDGET = "weight-bits=3,activation-bits=3"
METHODS = registry.names("methods")


class Net(nn.Module):
    """Two residual blocks' worth of convolutions with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2)])
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        for conv, norm in zip(self.convs, self.norms[1:3], strict=True):
            x = F.relu(x + norm(conv(x)))
        x = F.relu(self.norms[3](self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four kinds of stripes under noise, [count, 1, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    i, j = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.5 * i), torch.sin(1.5 * j), torch.sin(1.2 * (i + j)), torch.sin(1.2 * (i - j))])
    return waves[y].unsqueeze(1) + 0.8 * torch.randn(count, 1, 8, 8, generator=generator), y


@pytest.fixture(scope="module")
def net() -> Net:
    return trained()


def trained() -> Net:
    torch.manual_seed(0)
    model, (x, y) = Net(), samples(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def problem(net: nn.Module, method: object, budget: str = BUDGET, seed: int = 0, evaluations: int = 400) -> Problem:
    engine = evaluator(net, [samples(96, 1)], bits=BITS, loss="kl")
    parts = engine.split(0.25, np.random.default_rng(0)) if method.holdout else (engine, None)
    found = [None if part is None else Recorded(part, MemoryStore()) for part in parts]
    return Problem(engine.space, parse(budget, engine.space), found[0], found[1], engine, evaluations, seed, apart=0.25)


@pytest.fixture(scope="module", params=METHODS)
def kind(request: pytest.FixtureRequest) -> type:
    return registry.find("methods", request.param)


@pytest.fixture(scope="module")
def problems(net: Net) -> Callable[..., Problem]:
    """A method and what it may spend, to a problem on the trained network."""
    return functools.partial(problem, net)


class TestContract(MethodContract):
    """Every method that the registry finds."""


@pytest.mark.parametrize("evaluations", [40, 52, 60, 66, 70, 74, 80, 90, 110, 150, 200])
def test_shapley_keeps_to_any_number_of_evaluations(net: Net, evaluations: int) -> None:
    method = Shapley()
    given = problem(net, method, evaluations=evaluations)
    needed = 2 * (1 + int(given.space.mask.sum()) - len(given.space.slots))
    if evaluations < needed:
        with pytest.raises(SmpqError, match=f"it needs {needed}"):
            method.allocate(given)
    else:
        answer = method.allocate(given)
        assert given.evaluator.asked + given.holdout.asked <= evaluations
        assert "nan" not in answer.finding


def test_single_scores_are_the_losses_of_one_slot_alone(net: Net) -> None:
    given = problem(net, Single())
    scores = score_singles(given, given.evaluator)
    top = given.space.highest()
    base = given.evaluator(top[None])[0]
    for slot in range(len(top)):
        for candidate in range(top[slot]):
            row = top.copy()
            row[slot] = candidate
            assert scores.damage[slot, candidate] == pytest.approx(base - given.evaluator(row[None])[0], abs=1e-12)
    assert (scores.errors[:, :-1] > 0).all() and (scores.damage[np.arange(len(top)), top] == 0).all()
    assert scores.predict(top)[0] == pytest.approx(-base)


def test_uniform_uses_the_widest_width_that_fits(net: Net) -> None:
    method = registry.find("methods", "uniform")()
    for budget, bits in (("weight-bits=3.9", 3), ("weight-bits=4,activation-bits=4", 4), ("weight-bits=8", 8)):
        given = problem(net, method, budget)
        weights = [s.kind == "weight" for s in given.space.slots]
        chosen = given.space.widths[np.arange(len(weights)), method.allocate(given).assignment]
        assert set(chosen[weights]) == {bits}


def test_random_depends_on_the_seed_and_inverted_is_worse_than_single(net: Net) -> None:
    random = registry.find("methods", "random")()
    plans = {tuple(random.allocate(problem(net, random, seed=s)).assignment) for s in range(5)}
    assert len(plans) > 1
    losses = {}
    for name in ("single", "inverted"):
        method = registry.find("methods", name)()
        given = problem(net, method, "weight-bits=2.5,activation-bits=2.5")
        losses[name] = -given.evaluator(method.allocate(given).assignment[None])[0]
    assert losses["single"] < losses["inverted"]


class _Additive:
    """An evaluator without interactions: slot damages that add up, with a little noise between groups of samples."""

    fingerprint, groups, rows_per_batch = "additive", np.full(4, 0.25), 8

    def __init__(self, space: object, interaction: float, shift: float) -> None:
        self.space, self.slots = space, tuple(s.name for s in space.slots)
        rng = np.random.default_rng(3)
        self.damage = np.sort(rng.exponential(size=space.mask.shape))[:, ::-1]
        self.damage[:, -1] = 0
        self.interaction, self.shift = interaction, shift
        self.asked = 0

    def by_group(self, rows: np.ndarray) -> np.ndarray:
        self.asked += len(rows)
        parts = self.damage[np.arange(len(self.slots)), np.asarray(rows, np.intp)]
        loss = parts.sum(1) + self.interaction * (parts[:, 0] * parts[:, 1] + parts[:, 2] * parts[:, 3] * parts[:, 4])
        return -(loss[:, None] * (1 + 0.05 * np.arange(4)) + self.shift)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.by_group(rows) @ self.groups

    def derivatives(self, mixtures: np.ndarray) -> np.ndarray:
        self.asked += len(mixtures)
        return np.broadcast_to(-self.damage, mixtures.shape)


SETTINGS = (
    {},
    {"interactions": True},
    {"estimator": "odd"},
    {"estimator": "auto"},
    {"stop": "plan"},
    {"stop": "intervals"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shapley_spends_nothing_where_scores_add_up_and_wins_where_they_do_not(net: Net, settings: dict) -> None:
    space = problem(net, Single()).space
    budget = parse("weight-bits=4,activation-bits=4", space)
    found = {}
    for interaction in (0.0, 20.0):
        search, apart = _Additive(space, interaction, 1.0), _Additive(space, interaction, 1.3)
        given = Problem(space, budget, search, apart, None, 600, 0)
        answer = Shapley(**settings).allocate(given)
        plain = Milp()(answer.scores, budget)
        found[interaction] = (
            answer,
            search(plain[None])[0],
            search(answer.assignment[None])[0],
            search.asked + apart.asked,
        )
    answer, plain, chosen, asked = found[0.0]
    assert "additive within " in answer.finding and chosen == plain and asked < 250
    answer, plain, chosen, asked = found[20.0]
    assert "confirmed" in answer.finding and chosen > plain and asked <= 610
    assert (answer.attribution.standard_errors >= 0).all()
    pairs = answer.attribution.pairs
    assert (pairs is not None) == bool(settings.get("interactions"))
    if pairs is not None:
        assert pairs.shape == (len(space.slots),) * 2
        np.testing.assert_allclose(pairs, pairs.T, atol=1e-9)


def test_a_game_ends_when_the_rule_says_so(net: Net) -> None:
    """Of a network whose scores add up, every interval and the plan are known after the first pairs."""
    space = problem(net, Single()).space
    budget = parse("weight-bits=4,activation-bits=4", space)
    asked = {}
    for stop in ("", "plan", "intervals"):
        search, apart = _Additive(space, 0.0, 1.0), _Additive(space, 0.0, 1.3)
        Shapley(estimator="permutation", stop=stop).allocate(Problem(space, budget, search, apart, None, 600, 0))
        asked[stop] = search.asked
    assert asked["plan"] < asked[""] and asked["intervals"] < asked[""]


def test_two_slots_are_searched_by_their_scores() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    given = {"bits": BITS, "activation_bits": (), "fixed": {}, "budget": "weight-bits=3", "evaluations": 500}
    for interactions in (False, True):
        result = smpq_ext.search(model, [samples(64, 1)], **given, interactions=interactions)
        assert result.finding == "2 slots that can move are too few to look beyond single ones"


def test_settings_of_a_method_are_checked(net: Net) -> None:
    given = {"bits": BITS, "budget": "weight-bits=3"}
    with pytest.raises(SmpqError, match=r"^settings: the method 'shapley' has no 'interaction'; there are estimator, "):
        smpq_ext.search(net, [samples(64, 1)], **given, interaction=True)
    with pytest.raises(SmpqError, match=r"^settings: the method 'uniform' has no 'seeds'; there are none"):
        smpq_ext.search(net, [samples(64, 1)], **given, method="uniform", seeds=3)
    odd = ({"finalists": "abc"}, {"finalists": 0}, {"batch": 2.5}, {"patience": "x"}, {"patience": 2.0})
    for wrong in (
        {"stop": "soon"},
        {"interactions": 2},
        {"estimator": "best"},
        {"estimator": "exact"},
        {"estimator": "truncated"},
        *odd,
    ):
        with pytest.raises(SmpqError, match=f"^{next(iter(wrong))}: "):
            smpq_ext.search(net, [samples(64, 1)], **given, **wrong)


def test_a_method_of_the_users_own(net: Net) -> None:
    class Lowest:
        holdout = False

        def allocate(self, problem: Problem) -> Answer:
            return Answer(problem.space.lowest())

    result = smpq_ext.search(net, [samples(64, 1)], bits=BITS, budget="weight-bits=2", method=Lowest())
    assert set(result.plan.bits.values()) == {2, 8} and result.plan.method == "lowest"
    with pytest.raises(Infeasible, match="weight-bits"):
        smpq_ext.search(net, [samples(64, 1)], bits=BITS, budget="weight-bits=1.9", method="single")
