"""`search`: from a model, data and a budget to a verified plan."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import RandomSampler

import smpq_ext
from smpq_ext import budget as budgets
from smpq_ext import distributed, registry
from smpq_ext.core import Answer, Evaluator, Method, Plan, Problem, Result, SmpqError, Store, TooFew
from smpq_ext.engine.apply import apply
from smpq_ext.engine.evaluator import evaluator as make_evaluator
from smpq_ext.solvers.milp import Milp
from smpq_ext.store import MemoryStore, Recorded, SqliteStore, differences
from smpq_ext.typed import is_number, is_whole

HOLDOUT_SHARE = 0.25
MOST_SECONDS = 1e9
EVALUATIONS_PER_SLOT = 30
# The applied model normalises in another order of operations than the search: a rounding difference that lands on a tie
# moves a code by a whole step, and at 2 bits the layers after it amplify that. Measured: up to 0.4 % of the loss.
FEW = 12  # rows in the batches of a refinement, whose pace is that of most of a search
SAME_LOSS = 0.02

LOG = logging.getLogger("smpq_ext")

Progress = Callable[[str, int, int], None]

SETTINGS: dict[Any, tuple[str, Callable[[Any], bool]]] = {  # of methods, by annotation: what is needed, what has it
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a positive whole number", lambda v: is_whole(v) and v > 0),
    float: ("a positive number", lambda v: is_number(v) and 0 < v < np.inf),
    str: ("text", lambda v: isinstance(v, str)),
}


def search(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    *,
    bits: Sequence[int] = (2, 3, 4, 6, 8),
    activation_bits: Sequence[int] | None = None,
    budget: str,
    method: str | Method = "shapley",
    loss: Callable[[Any, Any], torch.Tensor] | str | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    renormalize: bool | str = "auto",
    store: str | os.PathLike[str] | Store | None = None,
    fixed: Mapping[str, int | str] | None = None,
    progress: bool | Progress = False,
    **settings: Any,
) -> Result:
    """Find the widths that keep the loss of `model` lowest within `budget`, and verify them.

    data: (inputs, targets) batches, read once; bits, activation_bits: candidate widths of weights and activations
    (None: the same, (): weights only); budget: "weight-bits=3", "activation-bits=3", "bytes=250000", "bitops=0.1",
    several separated by commas; loss: callable(outputs, targets), "kl", or None for cross-entropy; evaluations: at most
    so many forward passes over the calibration data (default: 30 for each slot, or 4 for each candidate); seconds: in
    place of it, as many as these pay for, measured once before the search and kept in the store; store: a file that
    keeps every evaluation, so that running again is resuming; fixed: slot or layer to width or "float" (default: first
    and last layer at 8; what is given stands instead of that); renormalize: re-estimate BatchNorm statistics for every
    assignment; progress: True for a line on standard error, or callable(stage, done, total); settings: arguments of the
    method, such as interactions=True for "shapley".

    In a torch.distributed process group all ranks call it, with the same arguments; they share the evaluations, rank 0
    keeps the store, and all get the result.

    Raises SmpqError (Infeasible where no assignment meets the budget) for input that cannot be searched.
    """
    study = Study(
        model,
        data,
        bits=bits,
        activation_bits=activation_bits,
        budget=budget,
        method=method,
        loss=loss,
        evaluations=evaluations,
        seconds=seconds,
        seed=seed,
        renormalize=renormalize,
        store=store,
        fixed=fixed,
        progress=progress,
        settings=settings,
    )
    try:
        return study.run()
    finally:
        study.close()


class Study:
    """A search that is ready to run: the arguments are those of `search`, checked, and the grids are calibrated."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[tuple[Any, Any]],
        *,
        bits: Sequence[int],
        activation_bits: Sequence[int] | None,
        budget: str,
        method: str | Method,
        loss: Callable[[Any, Any], torch.Tensor] | str | None,
        evaluations: int | None,
        seconds: float | None,
        seed: int,
        renormalize: bool | str,
        store: str | os.PathLike[str] | Store | None,
        fixed: Mapping[str, int | str] | None,
        progress: bool | Progress,
        settings: Mapping[str, Any],
    ) -> None:
        self._clock = _Clock()
        if evaluations is not None and not (is_whole(evaluations) and evaluations > 0):
            raise SmpqError(f"evaluations: a positive integer, not {evaluations!r}")
        if seconds is not None and not (is_number(seconds) and 0 < seconds < MOST_SECONDS):
            raise SmpqError(f"seconds: a positive number below {MOST_SECONDS:g}, not {seconds!r}")
        if seconds is not None and evaluations is not None:
            raise SmpqError("seconds: give this or evaluations, not both")
        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise SmpqError(f"seed: an integer from 0 to 2^63 - 1, not {seed!r}")
        if not isinstance(method, str) and (isinstance(method, type) or not hasattr(method, "allocate")):
            raise SmpqError(f"method: a name from `smpq list`, or an object with `allocate`, not {method!r}")
        if not (isinstance(progress, bool) or callable(progress)):
            raise SmpqError(f"progress: True, False or a callable(stage, done, total), not {progress!r}")
        if (
            store is not None
            and not isinstance(store, str | os.PathLike)
            and not (hasattr(store, "read") and hasattr(store, "append"))
        ):
            raise SmpqError(f"store: a path, or an object with `read` and `append`, not {store!r}")
        if store in ("", ":memory:"):
            raise SmpqError(f"store: {store!r} keeps nothing; name a file, or leave it out")
        if store is not None and isinstance(getattr(data, "sampler", None), RandomSampler):
            LOG.warning("data: this loader shuffles, so every run is a new study and the store resumes nothing")
        self.method: Method = _made(method, settings)
        self.name = method if isinstance(method, str) else type(method).__name__.lower()
        self.model = model
        self.engine = make_evaluator(
            model,
            data,
            bits=bits,
            activation_bits=activation_bits,
            loss=loss,
            renormalize=renormalize,  # type: ignore[arg-type]
            fixed=fixed,
        )
        space = self.engine.space
        limits = budgets.parse(budget, space)
        Milp()(
            np.where(space.mask, 0.0, np.inf), limits
        )  # an infeasible budget is an error before anything is measured
        keeps_apart = getattr(self.method, "holdout", False)
        parts = (
            self.engine.split(HOLDOUT_SHARE, np.random.default_rng([seed, 0])) if keeps_apart else (self.engine, None)
        )
        kept = store if isinstance(store, distributed.SharedStore) else distributed.kept(lambda: _store(store))
        self._opened = kept if isinstance(store, str | os.PathLike) else None

        def recorded(evaluator: Evaluator) -> Recorded:
            return Recorded(distributed.shared(evaluator), kept)

        self._whole = recorded(self.engine)
        self.notes: tuple[str, ...] = self.engine.notes
        if differ := differences(kept, self.engine.fingerprint, self.engine.digests):
            self.notes += (f"store: what it holds is of another study and not used; these differ: {', '.join(differ)}",)
        for note in self.notes:
            LOG.warning("%s", note)
        for module, why in self.engine.left_out.items():
            LOG.warning("not quantized: %s (%s)", module, why)
        self._parts = [recorded(part) for part in parts if part is not None]
        self._seconds = seconds
        if seconds is not None:
            evaluations = self._affordable(seconds, kept)
        self.problem = Problem(
            space=space,
            budget=limits,
            evaluator=self._parts[0],
            holdout=self._parts[1] if len(self._parts) > 1 else None,
            model=self.engine,
            # Four times what measuring each slot alone takes, where there are many candidates.
            evaluations=evaluations or max(EVALUATIONS_PER_SLOT * len(space.slots), 4 * int(space.mask.sum())),
            seed=int(seed),
            apart=HOLDOUT_SHARE if keeps_apart else 0.0,
            record=recorded,
            progress=_line if progress is True else progress or (lambda stage, done, total: None),
        )
        self._clock.lap("calibrate")

    @functools.cached_property
    def seconds_per_evaluation(self) -> float:
        """Measured once, on a batch of rows, after one to warm up; all ranks of a process group have to ask."""
        evaluator, highest = self._whole.evaluator, self.engine.space.highest()
        rows = np.random.default_rng(0).integers(0, highest + 1, (min(evaluator.rows_per_batch, FEW), len(highest)))
        rows = rows.astype(np.int8)
        evaluator(rows[: distributed.ranks()])
        start = time.perf_counter()
        evaluator(rows)
        return (time.perf_counter() - start) / len(rows)

    def _affordable(self, seconds: float, kept: Store) -> int:
        """How many evaluations the seconds pay for: measured once and kept, so that a second run asks the same."""
        study = f"{self.engine.fingerprint} for {seconds:g} s"
        if not kept.read(study):
            kept.append(study, {b"evaluations": np.array([max(1.0, seconds // self.seconds_per_evaluation)])})
        return int(kept.read(study)[b"evaluations"][0])

    def run(self) -> Result:
        """Search, apply the plan, and verify it by a forward pass of the applied model."""
        engine, problem = self.engine, self.problem
        self._clock.restart()
        try:
            answer = self.method.allocate(problem)
        except TooFew as error:
            if self._seconds is None:
                raise
            raise TooFew(f"seconds: {self._seconds:g} pay for {problem.evaluations}; {error}") from error
        if not isinstance(answer, Answer):
            raise SmpqError(f"method {self.name}: allocate returned {answer!r}, not a smpq_ext.core.Answer")
        if not problem.budget.feasible(answer.assignment).all():
            raise SmpqError(f"method {self.name}: its plan does not meet the budget; this is a fault of the method")
        slots, given = len(engine.slots), answer.attribution
        if given is not None and (len(given.values), len(given.standard_errors)) != (slots, slots):
            raise SmpqError(f"method {self.name}: its attribution has no value and error for each of the slots")
        self._clock.lap("search")

        widths = engine.space.bits(answer.assignment)
        statistics = engine.statistics(answer.assignment)
        plan = Plan(self.name, problem.seed, engine.fingerprint, widths, engine.grids_for(widths), statistics)
        measured = -float(self._whole(answer.assignment[None])[0])
        verified = engine.loss_of(apply(self.model, plan))
        if abs(verified - measured) > SAME_LOSS * max(1.0, abs(measured)):
            raise SmpqError(
                f"verify: the applied model's loss is {verified:.6g}, the search measured {measured:.6g}; "
                "either a forward pass of this model depends on more than its inputs, or the store holds evaluations "
                "of another version of it: name another store to tell"
            )
        self._clock.lap("verify")
        return Result(
            plan=plan,
            space=engine.space,
            budget={limit.name: limit.limit for limit in problem.budget.limits},
            cost=budgets.costs(engine.space, answer.assignment),
            attribution=answer.attribution,
            scores=answer.scores,
            score_errors=answer.score_errors,
            predicted_loss=answer.predicted_loss,
            measured_loss=verified,
            float_loss=engine.float_loss,
            trace=answer.trace,
            finding=answer.finding,
            evaluations=sum(part.asked for part in self._parts) + answer.evaluations,
            seconds=self._clock.seconds,
            peak_bytes=engine.peak_bytes,
            left_out=engine.left_out,
            versions={
                "smpq_ext": smpq_ext.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        )

    def close(self) -> None:
        """Close the store, where a path was given."""
        if self._opened is not None:
            self._opened.close()  # type: ignore[attr-defined]


def _made(method: str | Method, settings: Mapping[str, Any]) -> Method:
    """The method itself. Raises SmpqError where it has no such setting, or one is of another type."""
    kind = registry.find("methods", method) if isinstance(method, str) else lambda: method
    known = inspect.signature(kind, eval_str=True).parameters
    for name, value in settings.items():
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "there are none"
            raise SmpqError(f"settings: the method {method!r} has no {name!r}; {there_are}")
        words, good = SETTINGS.get(known[name].annotation, ("", lambda v: True))
        if not good(value):
            raise SmpqError(f"{name}: {words} is needed, not {value!r}")
    made: Method = kind(**settings)
    return made


def _store(given: str | os.PathLike[str] | Store | None) -> Store:
    if given is None:
        return MemoryStore()
    if not isinstance(given, str | os.PathLike):
        return given
    return SqliteStore(given)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        self.seconds[name] = time.perf_counter() - self._last
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()


def _line(stage: str, done: int, total: int) -> None:
    """Progress as one line on standard error; only its end where that is no terminal."""
    if done >= total or sys.stderr.isatty():
        print(f"\r{stage}: {done} of {total}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
