"""From mixtures of widths to losses on a fixed calibration set: the seam between numbers and tensors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import smpq_ext
from smpq_ext import ops
from smpq_ext.core import Assignments, Grid, Mixtures, SmpqError, Values
from smpq_ext.engine import gradients, grids, losses, samples, trials
from smpq_ext.engine.capture import Graph, Uncapturable, capture
from smpq_ext.engine.executor import MERGE, Executor
from smpq_ext.engine.grids import Calibrate, Grids
from smpq_ext.engine.layers import Layer, check_weights, duplicate, find, quiet
from smpq_ext.engine.memory import Meter, free_memory
from smpq_ext.engine.samples import Batch, Part
from smpq_ext.engine.space import candidates, make_space
from smpq_ext.typed import is_whole

# Bytes of the largest activation of one forward on a CPU: beyond it, it waits for memory. In lockstep more rows are
# worth more than that, for they share what comes before they part; most where every row holds all samples
# (docs/performance.md).
CACHE, LOCKSTEP, WHOLE = 4 << 20, 64 << 20, 512 << 20


def evaluator(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    *,
    bits: Sequence[int],
    activation_bits: Sequence[int] | None = None,
    loss: losses.Loss | str | None = None,
    renormalize: bool | str = "auto",
    memory: int | None = None,
    fixed: Mapping[str, int | str] | None = None,
    calibrate: Calibrate = "mse",
    mixture_bits: int = 32,
) -> TorchEvaluator:
    """The value of width assignments of `model` on `data`, an iterable of (inputs, targets).

    data: read once, and kept: the tensors of a list or tuple themselves, which must not change while it lives, copies
    of what any other iterable yields.

    bits: candidate widths, 1 to 16; activation_bits: other widths for activations, or () for weights only.
    loss: a function of (outputs, targets) to a scalar, a mean over samples; None is cross-entropy for integer targets
    [...] and outputs [..., classes]; "kl" the divergence from the float model's outputs [..., classes].
    renormalize: BatchNorm statistics re-estimated on the data for every row; "auto" where the model has BatchNorm.
    memory: bytes that a forward may take, kept by the process while the evaluator lives; default a quarter of what is
    free.
    fixed: slot or layer -> width or "float"; default first and last layer at 8; {} searches every slot.
    calibrate: "mse", "minmax" or "percentile". The model itself is only read.
    mixture_bits: 32, mixtures in float32, or 16, in fixed point: up to 1.7 times as fast on a CPU, where inputs are
    rounded to about 1/4,000 of their range and weights to 1/10,000 where a sum has 576 products.

    Raises SmpqError for what the user can mend.
    """
    if not isinstance(model, nn.Module):
        raise SmpqError(f"model: an nn.Module is needed, not a {type(model).__name__}")
    if calibrate not in ("mse", "minmax", "percentile"):
        raise SmpqError(f"calibrate: {calibrate!r} is not known; there are mse, minmax and percentile")
    if fixed is not None and not isinstance(fixed, Mapping):
        raise SmpqError(f"fixed: a dict from slot or layer to width or 'float', not a {type(fixed).__name__}")
    if memory is not None and not (is_whole(memory) and memory >= 0):
        raise SmpqError(f"memory: a number of bytes, not {memory!r}")
    if not (renormalize == "auto" or isinstance(renormalize, bool | np.bool_)):
        raise SmpqError(f"renormalize: 'auto', True or False, not {renormalize!r}")
    if mixture_bits not in (16, 32):
        raise SmpqError(f"mixture_bits: 16 or 32, not {mixture_bits!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise SmpqError("model: a ScriptModule's layers cannot be reached; give the nn.Module that it was made from")
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return TorchEvaluator(model, data, bits, activation_bits, loss, renormalize, memory, fixed, calibrate, mixture_bits)


class TorchEvaluator:
    """Assignments [n, slots] or mixtures [n, slots, candidates] to values [n]; made by `evaluator`."""

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[tuple[Any, Any]],
        bits: Sequence[int],
        activation_bits: Sequence[int] | None,
        loss: losses.Loss | str | None,
        renormalize: bool | str,
        memory: int | None,
        fixed: Mapping[str, int | str] | None,
        calibrate: Calibrate,
        mixture_bits: int,
    ) -> None:
        weight_bits = candidates("bits", bits)
        activation_widths = weight_bits
        if activation_bits is not None:
            activation_widths = candidates("activation_bits", activation_bits, empty=True)
        self.model = model
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self._losses_together = self.device.type == "cuda"  # where launches are dear, and memory is not
        self._notes: tuple[str, ...] = ()
        batches = samples.read(data, self.device)
        check_weights(model)
        self.loss_fn = losses.choose(loss, batches)
        twin = duplicate(model, share=True)
        with quiet(self.device):
            layers, self.left_out, norms = find(twin, batches[0])
            seen = grids.observe(twin, layers, batches)
        once = tuple(name for name, calls in norms.items() if calls == 1)
        if len(once) < len(norms):
            repeated = ", ".join(name for name in norms if name not in once)
            self._notes += (f"these BatchNorms run several times and keep their own statistics: {repeated}",)
        self.renormalize = bool(once) and bool(renormalize)  # "auto" is true
        self.layers: dict[str, nn.Module] = {layer.name: model.get_submodule(layer.name) for layer in layers}
        self.space = make_space(layers, weight_bits, activation_widths, fixed, self.left_out)
        self.slots = tuple(slot.name for slot in self.space.slots)
        self.slot_grids = grids.calibrate(layers, self.space, seen, calibrate)
        self.grids: dict[str, tuple[Grid, ...]] = {
            name: tuple(g.grid(k) for k in range(len(g.scale))) for name, g in self.slot_grids.items()
        }
        with quiet(self.device):
            graph = _captured(twin, layers, self.slot_grids, batches)
        self.norms = once if self.renormalize else ()  # names of the BatchNorms that are re-estimated
        self._executor = Executor(twin, layers, self.space, self.slot_grids, self.norms)
        self._memory = memory
        self.peak_bytes = 0  # of the forwards so far, by what a few samples took
        with quiet(self.device):
            self._folds, notes = trials.settle(self._executor, graph, batches[0], mixture_bits)
            self._mixes = not self._folds  # samples; later, memory may decide against folding, too
            self._notes += notes
            if self.loss_fn is losses.kl:
                reference = [losses.log_probabilities(self._executor.forward(b, 0, b.size)) for b in batches]
                batches = tuple(Batch(b.inputs, r, b.size) for b, r in zip(batches, reference, strict=True))
        self.digests = self._model_digests(losses.identity(self.loss_fn))
        self._bind(batches)

    def __call__(self, mixtures: Mixtures | Assignments) -> Values:
        """Values [n], minus the mean loss, of assignments int8 [n, slots] or mixtures float32 [n, slots, candidates].

        Raises ValueError for other shapes, SmpqError where a loss is not finite.
        """
        return (self.by_group(mixtures) * self.groups).sum(axis=1)  # not @: a row's sum must not depend on the others

    @property
    def notes(self) -> tuple[str, ...]:
        """What is slower, or other, than one might expect of this model and these arguments."""
        return self._notes + self._too_large

    def by_group(self, mixtures: Mixtures | Assignments) -> NDArray[np.float64]:
        """The value for each group of calibration samples, [n, groups]."""
        rows = self._rows(mixtures)
        if not len(rows):
            return np.empty((0, len(self.groups)))
        distinct, index = np.unique(rows, axis=0, return_inverse=True)  # sorted: neighbours share what comes first
        index = index.reshape(-1)
        out = np.empty((len(distinct), len(self.groups)))
        mixed = ~self.space.is_one_hot(distinct)
        with quiet(self.device):
            for kind in (mixed, ~mixed):  # a row is computed in the same way whatever the others are
                of_kind = np.flatnonzero(kind)
                for first in range(0, len(of_kind), self.rows_per_batch):
                    chunk = of_kind[first : first + self.rows_per_batch]
                    with self._executor.loaded(distinct[chunk]):
                        loss = self._losses()
                        if not np.isfinite(loss).all():
                            self._complain(loss, distinct[chunk], [int(np.argmax(index == r)) for r in chunk])
                        out[chunk] = -self._per_group(loss)
        return out[index]

    def derivatives(self, mixtures: Mixtures) -> NDArray[np.float64]:
        """Of the value by the shares of mixtures [n, slots, candidates], straight-through, on a few of the samples."""
        with quiet(self.device):
            return gradients.derivatives(self, self._rows(mixtures))

    def statistics(self, assignment: Assignments) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Mean and biased variance of every re-estimated BatchNorm at an assignment [slots]."""
        if not self.renormalize:
            return {}
        with quiet(self.device), self._executor.loaded(self._rows(np.asarray(assignment)[None])):
            found = self._executor.statistics = {}
            try:
                for batch in self.run_batches:
                    self._executor.forward(batch, 0, batch.size)
            finally:
                self._executor.statistics = None
        return {name: (mean.float().cpu().numpy(), var.cpu().numpy()) for name, (mean, var) in found.items()}

    def loss_of(self, model: nn.Module) -> float:
        """The mean loss of any model, such as an applied one, on the calibration samples, in the mode it is in."""
        with quiet(self.device):
            return float((self._per_group(self._losses(model)) @ self.groups)[0])

    def grids_for(self, bits: Mapping[str, int]) -> dict[str, Grid]:
        """The grid of every quantized slot at these widths (slot name -> width), fixed slots included.

        Raises SmpqError where a width is missing or is no candidate.
        """
        found = {}
        searched = zip(self.space.slots, self.space.candidates, strict=True)
        for slot, widths in (*searched, *((slot, (width,)) for slot, width in self.space.fixed)):
            width = bits.get(slot.name, widths[0] if len(widths) == 1 else None)
            if width not in widths:
                raise SmpqError(f"bits: {slot.name} has the candidates {widths}, not {width}")
            if slot.name in self.grids:
                found[slot.name] = self.grids[slot.name][widths.index(width)]
        return found

    def split(self, fraction: float, rng: np.random.Generator) -> tuple[TorchEvaluator, TorchEvaluator]:
        """Two evaluators on disjoint samples, grids in common: for the search, and the `fraction` that is kept apart.

        Raises SmpqError where either would have no sample.
        """
        if not 0 < fraction < 1:
            raise SmpqError(f"fraction: a number between 0 and 1, not {fraction!r}")
        total = sum(b.size for b in self.batches)
        apart = round(fraction * total)
        if not 0 < apart < total:
            needed = math.floor(0.5 / min(fraction, 1 - fraction)) + 1
            raise SmpqError(
                f"data: {fraction:g} of {total} samples leaves nothing on one side; give at least {needed} samples"
            )
        held = np.zeros(total, np.bool_)
        held[rng.permutation(total)[:apart]] = True
        return self._subset(~held), self._subset(held)

    def parts(self, most: int) -> tuple[tuple[float, TorchEvaluator], ...]:
        """At most so many, each on groups of samples of its own, with its share of the value.

        It is itself alone where the value of a sample depends on the others.
        """
        groups = np.flatnonzero(self.groups)
        count = min(most, len(groups))
        if self.renormalize or self._mixes or count < 2:
            return ((1.0, self),)
        return tuple((float(self.groups[own].sum()), self._part(own)) for own in np.array_split(groups, count))

    def _part(self, groups: NDArray[np.int64]) -> TorchEvaluator:
        """The same evaluator on these groups, the loss applied to the same pieces."""
        batches, pieces = [], []
        for b, batch in enumerate(self.batches):
            own = sorted((p for p in self._parts if p.batch == b and p.group in groups), key=lambda p: p.start)
            if not own:
                continue
            starts = np.cumsum([0, *(p.stop - p.start for p in own)]).tolist()
            for p, (start, stop) in zip(own, itertools.pairwise(starts), strict=True):
                group = int(np.searchsorted(groups, p.group))
                pieces.append(dataclasses.replace(p, batch=len(batches), start=start, stop=stop, group=group))
            batches.append(batch.take(torch.cat([torch.arange(p.start, p.stop) for p in own])))
        other = copy.copy(self)
        other.peak_bytes, other.float_loss = 0, math.nan
        other._take(tuple(batches), tuple(pieces), self.groups[groups] / self.groups[groups].sum(), part=True)
        return other

    def _subset(self, kept: NDArray[np.bool_]) -> TorchEvaluator:
        edges = np.cumsum([0, *(b.size for b in self.batches)])
        index = [torch.from_numpy(np.flatnonzero(kept[i:j])) for i, j in itertools.pairwise(edges)]
        other = copy.copy(self)
        other.peak_bytes = 0
        other._bind(tuple(b.take(k) for b, k in zip(self.batches, index, strict=True) if len(k)))
        return other

    def against_float(self, loss: losses.Loss) -> TorchEvaluator:
        """The same evaluator with a loss of (outputs, the float model's outputs)."""
        with quiet(self.device):
            batches = tuple(Batch(b.inputs, self._executor.forward(b, 0, b.size), b.size) for b in self.batches)
        other = copy.copy(self)
        other.loss_fn, other.peak_bytes = loss, 0
        other.digests = {**self.digests, "loss": _digest(self.digests["loss"], losses.identity(loss))}
        other._bind(batches)
        return other

    # The samples: parts, groups, chunks, fingerprint.

    def _bind(self, batches: tuple[Batch, ...]) -> None:
        """Take these samples, and measure what a row of them takes."""
        parts, groups = samples.parts(batches, functools.partial(losses.weight, self.loss_fn))
        run_batches = batches
        if self.renormalize:
            run_batches = (samples.concatenate(batches),)
            offset = [0, *itertools.accumulate(b.size for b in batches)]
            parts = tuple(
                dataclasses.replace(p, batch=0, start=offset[p.batch] + p.start, stop=offset[p.batch] + p.stop)
                for p in parts
            )
        self._take(batches, parts, groups)
        self.run_batches = run_batches
        with quiet(self.device):
            self._chunks()
            loss = self._losses()
            if not np.isfinite(loss).all():
                self._complain(loss, None, [0])
        self.float_loss = float((self._per_group(loss) @ self.groups)[0])

    def _take(
        self, batches: tuple[Batch, ...], parts: tuple[Part, ...], groups: NDArray[np.float64], part: bool = False
    ) -> None:
        self.batches = self.run_batches = batches
        self._parts, self.groups = parts, groups
        data = [(b.inputs, None if self.loss_fn is losses.kl else b.targets, b.size) for b in batches]
        digest = samples.digest(data)
        if part:  # these samples by themselves would be cut and grouped in another way
            digest = _digest("part", digest, list(parts))
        self.digests = {**self.digests, "data": digest}
        self.fingerprint = _digest(*sorted(self.digests.items()))

    def _chunks(self) -> None:
        """How many rows and samples one forward takes, from the bytes that a single row of few samples occupies."""
        batch = max(self.run_batches, key=lambda b: b.size)
        few = batch.size if not self._folds else min(batch.size, 4)
        assignment = self.space.one_hot(self.space.highest()[None])
        sample_bytes = loaded = 0
        for rows in (assignment, self.space.mask / self.space.mask.sum(1, keepdims=True)[None]):  # and a mixture
            with Meter() as meter, self._executor.loaded(rows.astype(np.float32)):
                kept, loaded, meter.peak = meter.live, max(loaded, meter.peak), meter.live
                outputs = self._executor.forward(batch, 0, few)
            sample_bytes = max(sample_bytes, -(-(meter.peak - kept) // few))
        result = sum(x.numel() * x.element_size() for x in tree_leaves(outputs) if isinstance(x, Tensor))
        memory = free_memory(self.device) // 4 if self._memory is None else self._memory
        count = max(b.size for b in self.run_batches)
        lockstep = self._executor.lockstep is not None
        images = memory // max(1, sample_bytes)
        whole = self.renormalize or not self._folds
        cached = images
        if self.device.type == "cpu":
            room = memory // max(1, loaded + 2 * sample_bytes)
            most = (WHOLE if whole else LOCKSTEP) if lockstep else CACHE
            cached = most // max(1, self._largest(batch, few, room))
        # In lockstep rows are worth more than samples: they share what comes before they part.
        samples_together = min(MERGE, count) if lockstep else count
        self._samples = count if whole else max(MERGE, min(images, cached, samples_together))
        # Outputs wait until all samples of a part are there; then they are put together.
        waiting = 2 * min(count, max(p.stop - p.start for p in self._parts) + 2 * self._samples)
        self._row_bytes = self._samples * sample_bytes + waiting * -(-result // few) + loaded + 64 * len(self._parts)
        rows = memory // self._row_bytes
        rows = min(rows, max(cached // self._samples, 8 if whole and lockstep else 1))
        self.rows_per_batch = max(1, int(rows)) if self._folds else 1
        self._too_large = ()
        if self._row_bytes > memory:
            given = f"a quarter of free memory is {memory}" if self._memory is None else f"memory= gives {memory}"
            self._too_large = (f"memory: one row takes about {self._row_bytes} bytes, {given}: rows run one at a time",)
        size, row = min(self._samples, batch.size), assignment.astype(np.float32)
        several = not lockstep and self.rows_per_batch > 1
        if several and not trials.takes_more(self._executor, row, batch, self.rows_per_batch, size):
            self._folds, self.rows_per_batch = False, 1
            self._notes += ("the model does not take more samples than it was given: coalitions run one at a time",)

    def _largest(self, batch: Batch, few: int, room: int) -> int:
        """The bytes, for one row and sample, of the largest value that grows with the rows; what all share does not.

        room: so many rows fit into memory.
        """
        several = max(1, min(8, room)) if self._folds else 1
        rows = np.random.default_rng(0).integers(0, self.space.highest() + 1, (several, len(self.slots)))
        few = min(few, 2) if self._folds else few
        with self._executor.loaded(self.space.one_hot(rows)), Meter() as meter:
            self._executor.forward(batch, 0, few)
        return meter.largest // (several * few)

    # One chunk of rows.

    def _losses(self, model: nn.Module | None = None) -> NDArray[np.float64]:
        """The loss of every loaded row and part, [rows, parts]; where none is loaded, of the float model or `model`."""
        n = max(1, self._executor.rows)
        torch.manual_seed(0)  # a model that draws numbers draws the same ones whichever rows are asked together
        out = []
        for b, batch in enumerate(self.run_batches):
            parts = [p for p in self._parts if p.batch == b]
            each, targets = losses.each_label(self.loss_fn), batch.targets
            if each and isinstance(targets, Tensor) and targets.dim() and targets.shape[0] % batch.size == 0:
                out.append(self._of_labels(each, parts, batch, n, model))
            else:
                out.append(self._of_parts(parts, batch, n, model))
        self.peak_bytes = max(self.peak_bytes, n * self._row_bytes)
        return np.concatenate(out, axis=1)

    def _outputs(self, batch: Batch, n: int, model: nn.Module | None) -> Iterator[tuple[int, int, Any]]:
        """Of one run of samples [start, stop) after the other: their outputs, by row."""
        for start, stop in samples.pieces(batch.size, self._samples, MERGE):
            outputs = self._executor.forward(batch, start, stop, model)
            _check_outputs(outputs)
            yield start, stop, tree_map(lambda x, size=stop - start: _per_row(x, n, size), outputs)

    def _of_labels(
        self, each: losses.Loss, parts: list[Part], batch: Batch, n: int, model: nn.Module | None
    ) -> NDArray[np.float64]:
        """The loss of every row and part of a batch, [n, parts], from what every label counts."""
        found = []
        for start, stop, rows in self._outputs(batch, n, model):
            targets = samples.part(batch.targets, batch.size, start, stop)
            if n > 1 and self._losses_together:
                values = self._loss(each, rows.flatten(0, 1), targets.repeat(n, *[1] * (targets.dim() - 1)))
            else:
                values = torch.stack([self._loss(each, _row(rows, r), targets) for r in range(n)])
            found.append(values.reshape(n, stop - start, -1))
        labels = torch.cat(found, dim=1).cpu().double().numpy()  # [n, samples, labels]; a row's sum is its own here
        out = np.empty((n, len(parts)))
        for k, p in enumerate(parts):
            own = labels[:, p.start : p.stop].reshape(n, -1)
            count = p.weight if self.loss_fn is losses.cross_entropy else own.shape[1]
            out[:, k] = own.sum(axis=1) / max(count, 1)
        return out

    def _of_parts(self, parts: list[Part], batch: Batch, n: int, model: nn.Module | None) -> NDArray[np.float64]:
        """The loss of every row and part of a batch, [n, parts], a part being given to the loss as a whole."""
        out: list[Tensor] = []
        waiting = list(parts)
        pieces: list[tuple[int, int, Any]] = []  # as long as a part needs them
        for start, stop, rows in self._outputs(batch, n, model):
            pieces.append((start, stop, rows))
            while waiting and waiting[0].stop <= stop:
                part = waiting.pop(0)
                pieces = [piece for piece in pieces if piece[1] > part.start]
                out += self._part_losses(pieces, part, batch, n)
        return torch.stack(out).cpu().numpy().reshape(len(parts), n).T

    def _part_losses(self, pieces: list[tuple[int, int, Any]], part: Part, batch: Batch, n: int) -> list[Tensor]:
        """The loss of every row on a part, from the outputs of pieces (start, stop, rows) that cover it."""
        first, last = pieces[0][0], pieces[-1][1]
        rows = pieces[0][2] if len(pieces) == 1 else tree_map(_join, *(rows for _, _, rows in pieces))
        targets = samples.part(batch.targets, batch.size, part.start, part.stop)
        out = []
        for r in range(n):
            own = samples.part(_row(rows, r), last - first, part.start - first, part.stop - first)
            value = self._loss(self.loss_fn, own, targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise SmpqError(
                    f"loss: it must return a scalar tensor, not {_shape(value)}; take the mean over the samples"
                )
            out.append(value.detach().reshape(()).double())
        return out

    def _loss(self, loss: losses.Loss, outputs: Any, targets: Any) -> Any:
        try:
            return loss(outputs, targets)
        except (SmpqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise SmpqError(
                f"loss: it fails on outputs of the model ({_shape(outputs)}) and targets ({_shape(targets)}): "
                f"{type(error).__name__}: {error}"
            ) from error

    def _per_group(self, loss: NDArray[np.float64]) -> NDArray[np.float64]:
        """Losses [rows, parts] to the weighted mean over each group, [rows, groups]."""
        total = np.zeros((len(loss), len(self.groups)))
        size = np.zeros(len(self.groups))
        for column, p in zip(loss.T, self._parts, strict=True):
            total[:, p.group] += column * p.weight
            size[p.group] += p.weight
        return total / np.where(size > 0, size, 1.0)

    def _complain(self, loss: NDArray[np.float64], chunk: NDArray[np.float32] | None, index: list[int]) -> None:
        """Raise SmpqError for the first loss [rows, parts] that is not finite, naming what it comes from."""
        row, k = np.argwhere(~np.isfinite(loss))[0]
        if chunk is None and (given := samples.non_finite(self.batches)):
            raise SmpqError(f"data: {given}, and the loss of the float model is {loss[row, k]}; leave the sample out")
        batch = self.run_batches[self._parts[k].batch]
        rows = contextlib.nullcontext() if chunk is None else self._executor.loaded(chunk[row : row + 1], False)
        with rows:
            where = self._executor.first_non_finite(batch, 0, batch.size)
        what = "of the float model" if chunk is None else f"of row {index[row]}, {self._describe(chunk[row])},"
        why = (
            "every activation is finite, the loss itself is not: look at loss= and the targets (a mean over none, "
            "where all are ignored, is NaN)"
        )
        if where:
            why = f"the first activation with NaN or infinity leaves {where}"
            if chunk is not None:
                why += "; leave the width out of bits, or give fixed= a width that works there"
        raise SmpqError(f"loss: the loss {what} is {loss[row, k]}; {why}")

    def _describe(self, mixtures: NDArray[np.float32]) -> str:
        """The slots that are below their highest width; where these are many, three, and then the widths of all."""
        chosen = mixtures.argmax(axis=1)
        below = np.flatnonzero(chosen < self.space.highest())
        said = [f"{self.slots[i]} at {self.space.candidates[i][chosen[i]]} bits" for i in below[:3]]
        more = ""
        if len(below) > 3:
            widths = " ".join(str(c[k]) for c, k in zip(self.space.candidates, chosen, strict=True))
            more = f" and {len(below) - 3} slots below their highest width (bits {widths}, as in slots)"
        return (", ".join(said) + more) or "all slots at their highest width"

    def _rows(self, mixtures: NDArray[Any]) -> NDArray[np.float32]:
        """Mixtures [n, slots, candidates] of what the caller gave. Raises ValueError where it is neither kind."""
        given = np.asarray(mixtures)
        mask = self.space.mask
        slots, most = mask.shape
        if given.ndim == 2 and given.dtype.kind in "iu":
            if given.shape[1] != slots:
                raise ValueError(f"assignments: expected [n, {slots}], got {list(given.shape)}")
            for row, k in np.argwhere((given < 0) | (given > self.space.highest()))[:1]:
                widths = self.space.candidates[k]
                raise ValueError(
                    f"assignments: row {row} has {given[row, k]} for {self.slots[k]}; an entry is an index into its "
                    f"candidates {widths}, from 0 to {len(widths) - 1}"
                )
            return self.space.one_hot(given)
        if given.ndim != 3 or given.shape[1:] != mask.shape or given.dtype.kind != "f":
            raise ValueError(
                f"rows: expected assignments, integers [n, {slots}], or mixtures, floats [n, {slots}, {most}], "
                f"got {given.dtype} {list(given.shape)}"
            )
        with np.errstate(over="ignore"):
            rows = given.astype(np.float32) + np.float32(0)  # -0 becomes 0: equal rows are the same bytes
        for row, k, c in np.argwhere(~np.isfinite(rows) | ((rows != 0) & ~mask))[:1]:
            raise ValueError(
                f"mixtures: row {row} has the weight {given[row, k, c]} for candidate {c} of {self.slots[k]}; weights "
                f"must be finite in float32, and 0 where a slot has no such candidate ({self.space.candidates[k]})"
            )
        return rows

    def _model_digests(self, loss: str) -> dict[str, str]:
        """What tells this study from others, but for the data: part to sha256."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        lockstep = self._executor.lockstep
        path = "swap" if lockstep is None else (lockstep.paths(), sorted(lockstep.attentions))
        tables = [(name, g.scale, g.zero_point, g.quant_min, g.quant_max) for name, g in self.slot_grids.items()]
        return {
            "model": _digest(losses.code_of(self.model)),
            "weights": samples.digest([list(tensors), list(tensors.values())]),
            "loss": _digest(loss),
            "options": _digest(self.space, self.renormalize),
            "grids": samples.digest(tables),
            "kernels": _digest(path),
            "versions": _digest(smpq_ext.__version__, torch.__version__, self._arithmetic(), ops.compiled),
        }

    def _arithmetic(self) -> str:
        """The kind of device, and on CUDA in how many bits libraries multiply."""
        if self.device.type != "cuda":
            return self.device.type
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its newer names
            return f"cuda {torch.backends.cudnn.allow_tf32} {torch.backends.cuda.matmul.allow_tf32}"


def _captured(
    model: nn.Module, layers: list[Layer], quantized: Mapping[str, Grids], batches: tuple[Batch, ...]
) -> Graph | Uncapturable:
    """The model's graph, or why there is none."""
    if not ops.compiled:
        return Uncapturable("the planner is not compiled")
    try:
        return capture(model, layers, quantized, batches)
    except Uncapturable as why:
        return why
    except Exception as error:  # the model itself runs: whatever capturing stumbles over, it can do without
        return Uncapturable(repr(error))


def _digest(*pieces: Any) -> str:
    return hashlib.sha256(repr(pieces).encode()).hexdigest()


def _per_row(x: Any, n: int, size: int) -> Any:
    """An output [n * size * k, ...] as [n, size * k, ...]; anything else as one entry for all rows."""
    if not isinstance(x, Tensor) or not x.dim():
        return x
    return x.unflatten(0, (n, -1)) if x.shape[0] % (n * size) == 0 else x.expand(n, *x.shape)


def _row(rows: Any, r: int) -> Any:
    return tree_map(lambda x: x[r] if isinstance(x, Tensor) and x.dim() else x, rows)


def _check_outputs(outputs: Any) -> None:
    """Raises SmpqError where the outputs are packed in something that cannot be cut into rows and samples."""
    for leaf in tree_leaves(outputs):
        if not isinstance(leaf, Tensor | int | float | str | None):
            raise SmpqError(
                f"model: it returns a {type(leaf).__name__}, which cannot be cut into samples; return a tensor, tuple, "
                "list or dict, or register the type with torch.utils._pytree.register_pytree_node"
            )


def _join(*pieces: Any) -> Any:
    return torch.cat(pieces, dim=1) if isinstance(pieces[0], Tensor) and pieces[0].dim() else pieces[-1]


def _shape(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
