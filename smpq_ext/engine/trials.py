"""How a model can be run, tried once on a few samples: channels last, rows folded or in lockstep, CUDA graphs."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from smpq_ext.engine import attention, samples
from smpq_ext.engine.capture import Graph, Uncapturable
from smpq_ext.engine.executor import MERGE, Executor
from smpq_ext.engine.fixed_point import FixedLayer
from smpq_ext.engine.floating import FloatLayer
from smpq_ext.engine.fusion import FusedLayer, Fusion
from smpq_ext.engine.integer import IntegerLayer
from smpq_ext.engine.replay import Replay
from smpq_ext.engine.samples import Batch


def settle(
    executor: Executor, graph: Graph | Uncapturable, batch: Batch, mixture_bits: int
) -> tuple[bool, tuple[str, ...]]:
    """Let the executor run the model in the fastest way that gives the same values.

    Returns whether rows can be run together, and what to tell the user.
    """
    executor.channels_last = channels_last_works(executor, batch)
    folds = fold_works(executor, batch)
    notes: list[str] = []
    if not folds:
        notes.append(
            "run together, samples give other values than apart (the model mixes them, draws random numbers, or their "
            "dimension is not the first): coalitions run one at a time"
        )
    if isinstance(graph, Uncapturable):
        folds = folds and not graph.mixes
        how = "coalitions are folded into the batch" if folds else "coalitions run one at a time"
        notes.append(f"torch.export cannot capture the model, {how}: {graph}")
    elif folds:
        why_not = _run_in_lockstep(executor, graph, batch, mixture_bits)
        if why_not:
            notes.append(f"its captured graph {why_not}, coalitions are folded into the batch")
        elif executor.device.type == "cuda" and (why_not := _record(executor, batch)):
            notes.append(f"its forward as a CUDA graph {why_not}, operations are launched one by one")
    return folds, tuple(notes)


def channels_last_works(executor: Executor, batch: Batch) -> bool:
    """Whether the float model runs, and agrees, with channels last: several times faster for few channels."""
    if not any(isinstance(layer.module, nn.Conv2d) for layer in executor.layers):
        return False
    expected = executor.forward(batch, 0, min(batch.size, 2))
    executor.channels_last = True
    try:
        return _close(executor.forward(batch, 0, min(batch.size, 2)), expected)
    except RuntimeError:  # the model uses view where only reshape works
        return False
    finally:
        executor.channels_last = False


def fold_works(executor: Executor, batch: Batch) -> bool:
    """Whether the first dimension is the batch wherever a layer or norm runs: run together equals run apart."""
    half = min(max(1, batch.size // 2), 4)
    seen: list[Tensor] = []
    owners = [layer.module for layer in executor.layers]
    owners += [m for m in executor.model.modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in owners]
    if batch.size == 1:
        batch = batch.take(torch.zeros(2, dtype=torch.int64))
    try:
        together, inputs = executor.forward(batch, 0, 2 * half), list(seen)
        alone = []
        for start in (0, half):  # both: samples may see only those before them
            seen.clear()
            outputs = executor.forward(batch, start, start + half)
            alone.append((list(seen), outputs))
    except Exception:
        return False
    finally:
        for handle in handles:
            handle.remove()
    if [x.shape[:1] for x in inputs] != [torch.Size([2 * x.shape[0]]) if x.dim() else x.shape for x in seen]:
        return False  # something that enters a layer does not grow with the batch
    parts = (samples.part((inputs, together), 2 * half, start, start + half) for start in (0, half))
    return all(_close(part, own) for part, own in zip(parts, alone, strict=True))


def takes_more(executor: Executor, row: NDArray[np.float32], batch: Batch, rows: int, size: int) -> bool:
    """Whether the model runs, and gives the same, for as many samples as `rows` rows like `row` of `size` make."""
    try:
        with executor.loaded(np.repeat(row, rows, axis=0)):
            last = samples.part(executor.forward(batch, 0, size), rows * size, (rows - 1) * size, rows * size)
    except Exception:
        return False
    with executor.loaded(row):
        return _close(last, executor.forward(batch, 0, size))


def _run_in_lockstep(executor: Executor, graph: Graph, batch: Batch, mixture_bits: int) -> str | None:
    """Run the rows in lockstep where that gives the same values as the model itself; else returns why not."""
    from smpq_ext.engine.lockstep import Lockstep  # needs the planner, which is compiled

    lockstep = Lockstep(graph, executor.layers, executor.norms)
    rows, few = _some_rows(executor), min(batch.size, MERGE)
    with executor.loaded(rows):
        swapped = executor.forward(batch, 0, few)
    highest = samples.part(swapped, 3 * few, 2 * few, 3 * few)

    def agrees(assigned: bool) -> bool:
        """Other roundings may move a tie: at the highest widths by a small step."""
        with executor.loaded(rows, assigned):
            return _close(samples.part(executor.forward(batch, 0, few), 3 * few, 2 * few, 3 * few), highest, 0.3)

    try:
        executor.lockstep = lockstep
        with executor.loaded(rows, assigned=False):
            same = _close(executor.forward(batch, 0, few), swapped)
        lockstep.integer, lockstep.floating = _fusions(executor, graph, mixture_bits)
        lockstep.attentions = attention.find(graph) if executor.device.type == "cpu" else {}
        if same and agrees(False) and agrees(True):
            return None
        why = "gives other values"
    except Exception as error:
        why = f"fails: {error!r}"
    executor.lockstep = None
    return why


def _record(executor: Executor, batch: Batch) -> str | None:
    """Replay the forwards of the rows as CUDA graphs where that gives the same values; else returns why not."""
    assert executor.lockstep is not None
    try:
        executor.replay = Replay(executor.lockstep, executor.device)
        with executor.loaded(_some_rows(executor)):
            first, *others = (executor.forward(batch, 0, min(batch.size, MERGE)) for _ in range(3))
        if all(_close(x, first) for x in others):
            return None
        why = "gives other values"
    except Exception as error:
        why = f"fails: {error!r}"
    executor.replay = None
    return why


def _some_rows(executor: Executor) -> NDArray[np.float32]:
    """The lowest widths, some, and the highest."""
    space = executor.space
    some = np.random.default_rng(0).integers(0, space.highest() + 1)
    return space.one_hot(np.stack([space.lowest(), some, space.highest()]))


def _fusions(executor: Executor, graph: Graph, mixture_bits: int) -> tuple[Fusion, Fusion]:
    """For assignments and for mixtures."""
    norms = {name: m for name, m in executor.model.named_modules() if isinstance(m, _BatchNorm)}
    layers: tuple[dict[int, FusedLayer], dict[int, FusedLayer]] = {}, {}
    mixed = (FixedLayer, FloatLayer) if mixture_bits == 16 else (FloatLayer,)
    for found, kinds in zip(layers, ((IntegerLayer, FloatLayer), mixed), strict=True):
        for k, layer in enumerate(executor.layers):
            for kind in kinds:
                with contextlib.suppress(ValueError):
                    found[k] = kind(layer)
                    break
    return Fusion(graph, layers[0], norms, executor.norms), Fusion(graph, layers[1], norms, executor.norms)


def _close(a: Any, b: Any, tolerance: float = 1e-3) -> bool:
    """Whether two trees of tensors agree, up to `tolerance` of the largest entry."""
    leaves, others = tree_leaves(a), tree_leaves(b)
    if len(leaves) != len(others):
        return False
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape != y.shape:
                return False
            if x.is_floating_point() and x.numel():
                if not torch.equal(x.isnan(), y.isnan()):
                    return False
                ours, theirs = x.nan_to_num(), y.nan_to_num()
                if (ours - theirs).abs().max() > tolerance * max(float(theirs.abs().max()), 1e-6):
                    return False
            elif not torch.equal(x, y):
                return False
    return True
