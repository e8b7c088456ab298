"""The calibration samples: batches of (inputs, targets), cut into pieces for the forward and parts for the loss."""

from __future__ import annotations

import hashlib
import itertools
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from smpq_ext.core import SmpqError

GROUPS = 8


@dataclass(frozen=True)
class Batch:
    """`size` samples: every tensor of the inputs whose first dimension is `size` holds one entry per sample."""

    inputs: Any  # a tensor, or a tuple, list or dict of tensors
    targets: Any
    size: int

    def rows(self, n: int, start: int, stop: int) -> Any:
        """The inputs of samples [start, stop), n times over: [n * samples, ...]."""

        def fold(leaf: Any) -> Any:
            if not self._per_sample(leaf):
                return leaf.clone() if isinstance(leaf, Tensor) else leaf
            part = leaf[start:stop]
            # A copy also for one row: the model may work in place, and the data is the user's.
            return part.clone() if n == 1 else part.repeat(n, *[1] * (part.dim() - 1))

        return tree_map(fold, self.inputs)

    def signature(self) -> tuple[Any, ...]:
        """Structure, shapes and dtypes of the inputs, but for the number of samples."""
        leaves, spec = tree_flatten(self.inputs)
        kinds = [
            (x.dtype, self._per_sample(x), tuple(x.shape[1:] if self._per_sample(x) else x.shape))
            if isinstance(x, Tensor)
            else (type(x), repr(x))
            for x in leaves
        ]
        return (spec, *kinds)

    def take(self, index: Tensor) -> Batch:
        """The samples at these sorted indices, int64 [k]."""

        def pick(leaf: Any) -> Any:
            return leaf[index.to(leaf.device)] if self._per_sample(leaf) else leaf

        def pick_target(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] % self.size:
                return leaf
            return leaf.unflatten(0, (self.size, -1))[index.to(leaf.device)].flatten(0, 1)

        return Batch(tree_map(pick, self.inputs), tree_map(pick_target, self.targets), len(index))

    def _per_sample(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.size


def read(data: Iterable[tuple[Any, Any]], device: torch.device) -> tuple[Batch, ...]:
    """The batches of `data` on `device`. Raises SmpqError where an item is no pair, or holds no batched tensor."""
    batches = []
    remedy = "give an iterable of (inputs, targets), inputs being a tensor, or a tuple, list or dict of tensors"
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise SmpqError(f"data: a {type(data).__name__} is no iterable of batches; {remedy}")
    copy = not isinstance(data, list | tuple)  # what yields batches may fill one buffer again and again
    with torch.random.fork_rng(_cuda(device)):  # a shuffling loader draws from the user's generator
        for k, item in enumerate(data):
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise SmpqError(f"data: item {k} is a {type(item).__name__}, not a pair; {remedy}")
            given = item[0]
            if isinstance(given, Mapping):  # also what tokenizers return; passed by keyword: the order says nothing
                given = {key: given[key] for key in sorted(given, key=str)}
            given, targets = tree_map(
                lambda x: x.to(device, copy=copy) if isinstance(x, Tensor) else x, (given, item[1])
            )
            if any(isinstance(x, np.ndarray) for x in tree_leaves((given, targets))):
                raise SmpqError(f"data: item {k} holds NumPy arrays; torch.from_numpy makes tensors of them")
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.dim()]
            if not tensors:
                raise SmpqError(f"data: the inputs of item {k} hold no tensor with a batch dimension; {remedy}")
            if not tensors[0].shape[0]:
                raise SmpqError(f"data: item {k} has 0 samples; leave it out")
            batches.append(Batch(given, targets, tensors[0].shape[0]))
    if not batches:
        raise SmpqError(f"data: it is empty; {remedy}")
    return tuple(batches)


def non_finite(batches: Iterable[Batch]) -> str | None:
    """The first item and sample whose inputs hold NaN, or infinity where none does: that may be a mask's."""
    for find in (torch.isnan, torch.isinf):
        for k, batch in enumerate(batches):
            for x in tree_leaves(batch.inputs):
                if isinstance(x, Tensor) and (found := find(x).nonzero()).numel():
                    return f"the inputs of item {k} hold {x[tuple(found[0])]}, first in sample {int(found[0, 0])}"
    return None


def concatenate(batches: tuple[Batch, ...]) -> Batch:
    """All batches as one. Raises SmpqError where their shapes do not allow it."""
    if len(batches) == 1:
        return batches[0]
    remedy = "give batches of equal shapes (the batch size may differ), or renormalize=False"

    def join(name: str, trees: list[Any]) -> Any:
        flat = [tree_flatten(tree) for tree in trees]
        leaves = []
        if any(spec != flat[0][1] for _, spec in flat):
            raise SmpqError(f"data: the {name} differ in structure, and BatchNorm needs one batch; {remedy}")
        for column in zip(*[leaves for leaves, _ in flat], strict=True):
            if all(isinstance(x, Tensor) for x in column):
                batched = all(x.dim() and x.shape[0] % b.size == 0 for x, b in zip(column, batches, strict=True))
                if batched and len({x.shape[1:] for x in column}) == 1:
                    leaves.append(torch.cat(column))
                    continue
                if not batched and all(torch.equal(x, column[0]) for x in column):
                    leaves.append(column[0])
                    continue
            elif all(type(x) is type(column[0]) and x == column[0] for x in column):
                leaves.append(column[0])
                continue
            shapes = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else repr(x) for x in column[:4])
            raise SmpqError(f"data: the {name} ({shapes}) do not join, and BatchNorm needs one batch; {remedy}")
        return tree_unflatten(leaves, flat[0][1])

    inputs = join("inputs", [b.inputs for b in batches])
    targets = join("targets", [b.targets for b in batches])
    return Batch(inputs, targets, sum(b.size for b in batches))


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def run(model: nn.Module, batch: Batch, item: int) -> Any:
    """The float model's outputs for a batch. Raises SmpqError, naming the item of the data, where its forward fails."""
    try:
        return call(model, batch.rows(1, 0, batch.size))
    except SmpqError:
        raise
    except Exception as error:
        what, where = f"{type(error).__name__}: {error}".rstrip(": "), failed_layer(error)
        raise SmpqError(
            f"model: its forward fails in {where} on the inputs of item {item} ({what}); do the data fit it?"
        ) from error


def failed_layer(error: Exception) -> str | None:
    """The innermost module whose forward the error came through; None where it came through none."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    inside = [f.f_locals["self"] for f in frames if isinstance(f.f_locals.get("self"), nn.Module)]
    if not inside:
        return None
    names = [name for name, module in inside[0].named_modules() if module is inside[-1]]
    kind = type(inside[-1]).__name__
    return f"layer {names[0]!r} ({kind})" if names and names[0] else kind


def part(tree: Any, count: int, start: int, stop: int) -> Any:
    """Samples [start, stop) of `count`, of every tensor whose first dimension is a multiple of `count`."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] % count:
            return leaf
        step = leaf.shape[0] // count
        return leaf[start * step : stop * step]

    return tree if (start, stop) == (0, count) else tree_map(cut, tree)


def pieces(count: int, most: int, least: int) -> list[tuple[int, int]]:
    """[0, count) cut evenly into runs of about `most`, none shorter than `least`."""
    number = max(1, min(-(-count // most), count // least))
    return _runs(count, number)


def _runs(count: int, number: int) -> list[tuple[int, int]]:
    edges = [count * k // number for k in range(number + 1)]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True)
class Part:
    """A run of samples of one batch: the loss is applied to each part as a whole, whatever the forward's chunks."""

    batch: int
    start: int
    stop: int
    group: int
    weight: float  # of its loss in the mean over its group


def parts(
    batches: tuple[Batch, ...], weigh: Callable[[Any, int], float]
) -> tuple[tuple[Part, ...], NDArray[np.float64]]:
    """Every batch split evenly so that there are about 8 groups in all, and the groups' shares of the mean loss.

    weigh: (targets, samples) of a part to its weight. Raises SmpqError where nothing has any.
    """
    per_batch = max(1, round(GROUPS / len(batches)))
    cuts = []
    for b, batch in enumerate(batches):
        # Targets that are not tensors, such as a list of boxes, cannot be cut.
        whole = batch.targets is not None and not any(
            isinstance(x, Tensor) and x.dim() and x.shape[0] % batch.size == 0 for x in tree_leaves(batch.targets)
        )
        cuts += [(b, i, j) for i, j in _runs(batch.size, 1 if whole else min(per_batch, batch.size))]
    groups = len(cuts) if len(cuts) <= 2 * GROUPS else GROUPS
    found = []
    share = np.zeros(groups)
    for k, (b, i, j) in enumerate(cuts):
        group = k * groups // len(cuts)
        weight = weigh(part(batches[b].targets, batches[b].size, i, j), j - i)
        found.append(Part(b, i, j, group, weight))
        share[group] += weight
    if not share.sum():
        raise SmpqError("data: every target is ignored (-100), there is nothing to measure")
    return tuple(found), share / share.sum()


def digest(trees: Iterable[Any]) -> str:
    """sha256 of tensors (dtype, shape and bytes) and of the repr of everything else."""
    sha = hashlib.sha256()
    for leaf in tree_leaves(list(trees)):
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            sha.update(
                leaf.detach()
                .cpu()
                .clone(memory_format=torch.contiguous_format)
                .view(-1)
                .view(torch.uint8)
                .numpy()
                .tobytes()
            )
        else:
            sha.update(repr(leaf).encode())
        sha.update(b"\0")
    return sha.hexdigest()


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory of x has its channels last, and not also first."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def take_rows(x: Tensor, rows: int, index: Tensor) -> Tensor:
    """The rows [k] of x [rows * samples, ...] as [k * samples, ...], in the memory format of x."""
    if is_channels_last(x):
        return take_rows(x.permute(0, 2, 3, 1), rows, index).permute(0, 3, 1, 2)
    return x.unflatten(0, (rows, -1)).index_select(0, index).flatten(0, 1)
