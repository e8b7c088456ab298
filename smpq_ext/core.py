"""The vocabulary as data: spaces, budgets, games, attributions, plans and results. NumPy only, no torch."""

from __future__ import annotations

import json
import numbers
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from smpq_ext import typed

Assignments = NDArray[np.int8]  # [n, slots] or [slots]: the index of a candidate for each slot
Mixtures = NDArray[np.float32]  # [n, slots, candidates]
Coalitions = NDArray[np.bool_]  # [n, players]
Values = NDArray[np.float64]  # [n]
Table = NDArray[np.float64]  # [slots, candidates]

FLOAT_BITS = 32


class SmpqError(Exception):
    """An input or a situation that the user can mend; the command line prints it on one line and exits with 2."""


class TooFew(SmpqError):
    """The evaluations that are allowed do not pay for what was asked; the message says how many would."""


class Infeasible(SmpqError):
    """No assignment meets the budget; the message names the limit and the smallest cost that can be reached."""


@dataclass(frozen=True)
class Slot:
    """One thing that gets a width: the weight of a layer, or the activation that enters it."""

    layer: str
    kind: Literal["weight", "activation"]
    elements: int  # parameters of the weight, or elements of the activation for one sample
    macs: int  # multiply-accumulates of the layer for one sample
    scales: int  # scale factors that the grid of this slot stores

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"


@dataclass(frozen=True)
class Space:
    """The searched slots with their candidates, and the slots whose width is fixed.

    `candidates[i]` lists the widths of slot i, ascending. Arrays over [slots, candidates] are padded to the longest
    list; `mask` tells the real entries.
    """

    slots: tuple[Slot, ...]
    candidates: tuple[tuple[int, ...], ...]
    fixed: tuple[tuple[Slot, int], ...] = ()  # slot and width, FLOAT_BITS where it stays float
    tied: tuple[tuple[int, ...], ...] = ()  # groups of indices into `slots` that must take the same width

    def __post_init__(self) -> None:
        if len(self.slots) != len(self.candidates):
            raise ValueError("candidates: one tuple of widths per slot")
        for slot, widths in zip(self.slots, self.candidates, strict=True):
            if not widths or list(widths) != sorted(set(widths)):
                given = f"{reprlib.repr(slot.name)}: {reprlib.repr(widths)}"
                raise ValueError(f"candidates: distinct widths in ascending order, not those of {given}")
        every = [*zip(self.slots, self.candidates, strict=True), *((slot, (width,)) for slot, width in self.fixed)]
        if len({slot.name for slot, _ in every}) < len(every):
            raise ValueError("slots, fixed: a slot may be there once")
        for slot, widths in every:
            _check_widths(reprlib.repr(slot.name), widths)
        if not all(group and set(group) <= set(range(len(self.slots))) for group in self.tied):
            raise ValueError(f"tied: groups of indices of the {len(self.slots)} slots")

    @property
    def width_count(self) -> int:
        """The size of the candidates axis."""
        return max((len(c) for c in self.candidates), default=0)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True where a candidate exists, [slots, candidates]."""
        return np.arange(self.width_count) < np.array([[len(c)] for c in self.candidates]).reshape(-1, 1)

    @property
    def widths(self) -> Table:
        """Bits, [slots, candidates]; NaN where a slot has fewer candidates."""
        table = np.full((len(self.slots), self.width_count), np.nan)
        for row, widths in zip(table, self.candidates, strict=True):
            row[: len(widths)] = widths
        return table

    def lowest(self) -> Assignments:
        return np.zeros(len(self.slots), np.int8)

    def highest(self) -> Assignments:
        return np.array([len(c) - 1 for c in self.candidates], np.int8)

    def bits(self, assignment: Assignments) -> dict[str, int]:
        """Width by slot name, fixed slots included."""
        searched = {s.name: c[int(a)] for s, c, a in zip(self.slots, self.candidates, assignment, strict=True)}
        return searched | {slot.name: width for slot, width in self.fixed}

    def one_hot(self, assignments: Assignments) -> Mixtures:
        """The mixtures [n, slots, candidates] that are these assignments [n, slots]."""
        return np.eye(self.width_count, dtype=np.float32)[np.asarray(assignments, np.intp)]

    @staticmethod
    def is_one_hot(mixtures: Mixtures) -> NDArray[np.bool_]:
        """Which of the mixtures [n, slots, candidates] are assignments."""
        single = ((mixtures != 0).sum(axis=2) == 1).all(axis=1)
        return np.asarray(single & (mixtures.max(axis=2) == 1).all(axis=1), np.bool_)


@dataclass(frozen=True)
class Product:
    """A cost that depends on the widths of two slots: `cost[i, j]` for candidate i of `first` and j of `second`."""

    first: int
    second: int
    cost: Table


@dataclass(frozen=True)
class Limit:
    """Sum of an additive cost table and of products, at most `limit`, in `unit`; fixed slots are in `constant`."""

    name: str
    unit: str
    limit: float
    table: Table
    products: tuple[Product, ...] = ()
    constant: float = 0.0

    def cost(self, assignments: Assignments) -> Values:
        """Cost of each assignment, [n], in `unit`."""
        rows = np.atleast_2d(np.asarray(assignments, np.intp))
        total = self.constant + self.table[np.arange(self.table.shape[0]), rows].sum(axis=1)
        for product in self.products:
            total = total + product.cost[rows[:, product.first], rows[:, product.second]]
        return np.asarray(total, np.float64)


@dataclass(frozen=True)
class Budget:
    """Every limit that a plan must meet, and the slots that must agree."""

    limits: tuple[Limit, ...]
    tied: tuple[tuple[int, ...], ...] = ()

    def leaders(self, slots: int) -> NDArray[np.int64]:
        """The first slot of the group that each slot is tied in, itself where it is in none, [slots]."""
        found = np.arange(slots)
        for group in self.tied:
            found[list(group)] = group[0]
        return found

    def feasible(self, assignments: Assignments) -> NDArray[np.bool_]:
        """Which of the assignments [n, slots] meet every limit, [n]."""
        rows = np.atleast_2d(assignments)
        good = np.ones(len(rows), np.bool_)
        for limit in self.limits:
            good &= limit.cost(rows) <= limit.limit * (1 + 1e-9) + 1e-9
        for group in self.tied:
            good &= (rows[:, list(group)] == rows[:, [group[0]]]).all(axis=1)
        return good


class Evaluator(Protocol):
    """The one seam between numbers and tensors."""

    fingerprint: str
    space: Space
    slots: tuple[str, ...]  # names of the searched slots
    groups: NDArray[np.float64]  # [groups]: the share of the calibration samples in each group, sums to 1
    rows_per_batch: int  # how many rows are worth asking at once

    def __call__(self, mixtures: Mixtures | Assignments) -> Values:
        """Mixtures [n, slots, candidates] or assignments [n, slots] to values [n]: minus the mean loss."""

    def by_group(self, mixtures: Mixtures | Assignments) -> NDArray[np.float64]:
        """The same value for each group of calibration samples, [n, groups]; `by_group(m) @ groups` is the value."""

    def derivatives(self, mixtures: Mixtures) -> NDArray[np.float64]:
        """Of the value by the shares of mixtures [n, slots, candidates], as well as a backward pass tells them."""

    def parts(self, most: int) -> Sequence[tuple[float, Evaluator]]:
        """At most so many, each on groups of samples of its own, with its share of the value.

        It is itself alone where the value of a sample depends on the others.
        """


class Game(Protocol):
    """Coalitions in, values out; `spent` counts the coalitions asked, whether or not the answer was known."""

    players: int
    spent: int

    def __call__(self, coalitions: Coalitions) -> Values: ...


def ask(game: Game, coalitions: Coalitions) -> Values:
    """Values [n] of coalitions [n, players]. Raises SmpqError where the game gives anything but n finite numbers."""
    values = np.asarray(game(coalitions))
    if values.dtype.kind not in "biuf":
        raise SmpqError(f"game: values are real numbers, not {values.dtype}")
    values = values.astype(np.float64)
    if values.shape != (len(coalitions),):
        raise SmpqError(f"game: {len(coalitions)} coalitions get values {list(values.shape)}, not [{len(coalitions)}]")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        inside = np.flatnonzero(coalitions[row]).tolist()
        raise SmpqError(f"game: the value of the coalition of players {inside} is {values[row]}")
    return values


def check(budget: int, players: int) -> None:
    """Raise SmpqError where a budget of evaluations is no whole number, or a game has no players."""
    if not isinstance(budget, numbers.Integral) or isinstance(budget, bool):
        raise SmpqError(f"evaluations: a whole number, not {budget!r}")
    if players < 1:
        raise SmpqError(f"game: it has {players} players, there is nothing to attribute")


def pay(budget: int, needed: int, players: int, name: str) -> None:
    """Raise TooFew where a budget of evaluations is less than an estimator needs, and what `check` raises."""
    check(budget, players)
    if budget < needed:
        raise TooFew(f"evaluations: {budget} are too few for {name} of {players} players; it needs {needed}")


@dataclass(frozen=True)
class Attribution:
    """Value per player with its standard error, and the evaluations spent so far. Arrays [players]."""

    values: Values
    standard_errors: Values
    evaluations: int
    reason: str = ""  # which estimator was taken and why, where one chooses
    pairs: Table | None = None  # what two players add together, [players, players], where it was asked for
    pair_errors: Table | None = None  # its standard errors


class Estimator(Protocol):
    def steps(self, game: Game, budget: int, rng: np.random.Generator) -> Iterator[Attribution]:
        """Ever better attributions of `game`, spending at most `budget` evaluations in all; the caller may stop."""


class Solver(Protocol):
    def __call__(self, table: Table, budget: Budget, pairwise: NDArray[np.float64] | None = None) -> Assignments:
        """The assignment [slots] of least summed damage `table` within `budget`; +inf marks what is not allowed.

        Raises Infeasible.
        """


class Store(Protocol):
    def read(self, study: str) -> dict[bytes, NDArray[np.float64]]: ...

    def append(self, study: str, rows: Mapping[bytes, NDArray[np.float64]]) -> None: ...


@dataclass(frozen=True)
class Grid:
    """A quantization grid: value = (code - zero_point) * scale, code in [quant_min, quant_max]."""

    scale: NDArray[np.float32]  # [channels] or []
    zero_point: NDArray[np.float32]  # the shape of scale
    quant_min: int
    quant_max: int
    axis: int | None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape or self.scale.ndim != (self.axis is not None):
            raise ValueError(
                "scale, zero_point: one number each, or one for every channel along axis, "
                f"not {self.scale.shape} and {self.zero_point.shape} with axis {self.axis}"
            )
        if not (np.isfinite(self.scale) & (self.scale >= 0) & np.isfinite(self.zero_point)).all():
            raise ValueError("scale, zero_point: finite numbers, and no scale below 0")
        if not -(1 << 16) <= self.quant_min < self.quant_max <= (1 << 16):
            raise ValueError(
                f"quant_min, quant_max: ascending codes of at most 16 bits, not {self.quant_min} and {self.quant_max}"
            )


@dataclass(frozen=True)
class Plan:
    """The chosen assignment with everything needed to rebuild the quantized model from the float one."""

    method: str
    seed: int
    fingerprint: str
    bits: dict[str, int]  # slot name -> width, fixed slots included
    grids: dict[str, Grid] = field(default_factory=dict)  # slot name -> grid at that width; float slots are absent
    statistics: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        for name, width in self.bits.items():
            _check_widths(f"bits of {reprlib.repr(name)}", (width,))
        for name, (mean, variance) in self.statistics.items():
            if mean.ndim != 1 or mean.shape != variance.shape:
                shapes = f"{mean.shape} and {variance.shape}"
                raise ValueError(f"statistics of {reprlib.repr(name)}: mean and variance by channel, not {shapes}")
            if (variance < 0).any():
                raise ValueError(f"statistics of {reprlib.repr(name)}: a variance is not negative")

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "method": self.method,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "bits": self.bits,
            "grids": {
                name: {
                    "scale": g.scale.tolist(),
                    "zero_point": g.zero_point.tolist(),
                    "quant_min": g.quant_min,
                    "quant_max": g.quant_max,
                    "axis": g.axis,
                }
                for name, g in self.grids.items()
            },
            "statistics": {name: [m.tolist(), v.tolist()] for name, (m, v) in self.statistics.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan in a plan.json object. Raises SmpqError where it is not one."""
        if not isinstance(data, Mapping):
            raise SmpqError(f"plan: json.loads the text first; an object is needed, not a {type(data).__name__}")
        if (version := data.get("version")) != 1:
            raise SmpqError(f"plan: version {reprlib.repr(version)} is not known; this release reads version 1")
        try:
            return typed.read(cls, data)  # type: ignore[no-any-return]
        except ValueError as error:
            raise SmpqError(f"plan: not a plan of this library ({error}); its search, run again, writes it") from error


@dataclass(frozen=True)
class Answer:
    """What a method hands back: the assignment, and what it learned on the way."""

    assignment: Assignments
    scores: Table | None = None  # predicted damage [slots, candidates]
    score_errors: Table | None = None  # its standard errors
    predicted_loss: float | None = None  # loss that the method expects of the assignment
    attribution: Attribution | None = None  # of the slots, where a game was played
    trace: tuple[tuple[float, float], ...] = ()  # predicted and measured loss of assignments near the budget
    finding: str = ""  # one sentence on what the search found
    evaluations: int = 0  # spent elsewhere than on the problem's evaluators


@dataclass(frozen=True)
class Problem:
    """All that a method may look at."""

    space: Space
    budget: Budget
    evaluator: Evaluator
    holdout: (
        Evaluator | None
    )  # the same model on calibration samples kept apart; only for methods with `holdout = True`
    model: Any  # the engine's handle on model and data, for methods that need gradients or weights
    evaluations: int  # at most so many rows may be asked of evaluator and holdout together
    seed: int
    apart: float = 0.0  # the share of the calibration samples that `holdout` has
    record: Callable[[Evaluator], Evaluator] = lambda evaluator: evaluator  # keeps what another evaluator is asked
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None

    def rng(self, *stream: int) -> np.random.Generator:
        """A random stream of its own for every (seed, stream)."""
        return np.random.default_rng([self.seed, *stream])


class Method(Protocol):
    """Chooses an assignment; `holdout` says whether part of the calibration data is to be kept apart for it."""

    holdout: bool

    def allocate(self, problem: Problem) -> Answer: ...


@dataclass(frozen=True)
class Result:
    """The plan, how it was found, and what it cost. Losses are means over the calibration data."""

    plan: Plan
    space: Space
    budget: Mapping[str, float]  # limit name -> limit
    cost: Mapping[str, float]  # limit name -> cost of the plan, and weight-bits, activation-bits, bytes, bitops
    attribution: Attribution | None
    scores: Table | None
    score_errors: Table | None
    predicted_loss: float | None
    measured_loss: float
    float_loss: float
    trace: tuple[tuple[float, float], ...]
    finding: str
    evaluations: int
    seconds: Mapping[str, float]  # calibrate, search, verify
    peak_bytes: int
    left_out: Mapping[str, str] = field(default_factory=dict)  # module -> why it is not quantized
    versions: Mapping[str, str] = field(default_factory=dict)  # of this library, torch and Python

    def __post_init__(self) -> None:
        space, shape = self.space, self.space.mask.shape
        if not space.slots:
            raise ValueError("space: at least one slot is searched")
        for slot, widths in [*zip(space.slots, space.candidates, strict=True), *((s, (w,)) for s, w in space.fixed)]:
            if (width := self.plan.bits.get(slot.name)) not in widths:
                raise ValueError(
                    f"plan: {reprlib.repr(slot.name)} has width {width}, the space allows {', '.join(map(str, widths))}"
                )
        arrays = {"scores": (self.scores, shape), "score_errors": (self.score_errors, shape)}
        if (given := self.attribution) is not None:
            arrays["attribution.values"] = given.values, shape[:1]
            arrays["attribution.standard_errors"] = given.standard_errors, shape[:1]
            arrays["attribution.pairs"] = given.pairs, shape[:1] * 2
            arrays["attribution.pair_errors"] = given.pair_errors, shape[:1] * 2
        for name, (array, wanted) in arrays.items():
            if array is not None and array.shape != wanted:
                raise ValueError(f"{name}: numbers of shape {wanted}, as the space has, not {array.shape}")
            if array is not None and "errors" in name and (array < 0).any():
                raise ValueError(f"{name}: standard errors are not negative")
            found = name in ("attribution.values", "attribution.pairs")
            if array is not None and found and not np.isfinite(array).all():
                raise ValueError(f"{name}: finite numbers are needed")
        for name, limit in self.budget.items():
            if not limit > 0:
                raise ValueError(f"budget: {reprlib.repr(name)} is a number above 0, not {limit}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write result.json and plan.json into the folder `path`, each in one step."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", json.dumps(self.plan.to_json()))
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("plan", "space", "attribution")}
        data["space"] = {
            "slots": [vars(s) for s in self.space.slots],
            "candidates": self.space.candidates,
            "fixed": [[vars(s), w] for s, w in self.space.fixed],
            "tied": self.space.tied,
        }
        data["attribution"] = None if self.attribution is None else vars(self.attribution)
        write_text(folder / "result.json", json.dumps(data, default=_plain, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Read what `save` wrote. Raises SmpqError where the folder holds no result."""
        folder = Path(path)
        try:
            data = typed.load(folder / "result.json")
            plan = Plan.from_json(typed.load(folder / "plan.json"))
            return typed.read(cls, {**data, "plan": plan} if isinstance(data, dict) else data)  # type: ignore[no-any-return]
        except OSError as error:
            raise SmpqError(f"result: cannot read {error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise SmpqError(
                f"result: {folder} holds no result of this library ({error}); its search, run again, writes it"
            ) from error


def write_text(path: Path, text: str) -> None:
    """Replace the file in one step, so that a reader or a crash never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # JSON has no word for what is not finite, such as the score of no candidate
        return np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written to result.json")


def _check_widths(name: str, widths: tuple[int, ...]) -> None:
    for width in widths:
        if not (1 <= width <= 16 or width == FLOAT_BITS):
            raise ValueError(f"{name}: a width from 1 to 16, or {FLOAT_BITS} for float, not {width}")
