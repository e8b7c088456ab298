"""Forwards recorded as CUDA graphs, without a GPU: a record repeats operations on the addresses that they had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import odd_models
import pytest
import torch
from random_models import MODELS, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import smpq_ext
from smpq_ext.engine import replay

pytestmark = pytest.mark.usefixtures("compiled")
aten = torch.ops.aten


class Recording(TorchDispatchMode):
    """Keeps every operation with its arguments and results. What a CUDA stream cannot capture is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default), f"{func} waits"
        result = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None for r in func._schema.returns)
        made = [] if views else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.calls.append((func, args, kwargs or {}, made))
        return result


class Emulated:
    """As replay.Recorded."""

    count = replays = 0

    def __init__(self, run: Callable[[Any], Any], inputs: Any, pool: Any) -> None:
        self.inputs = tree_map(torch.clone, inputs)
        with Recording() as recording, pytest.MonkeyPatch.context() as forbidden:
            forbidden.setattr(torch, "from_numpy", None)
            forbidden.setattr(torch, "tensor", None)
            self.outputs = run(self.inputs)
        self.calls = recording.calls
        for *_, made in self.calls:  # capturing computes nothing
            for x in made:
                x.fill_(float("nan") if x.is_floating_point() else 0)
        Emulated.count += 1

    def __call__(self, inputs: Any) -> Any:
        tree_map(lambda mine, given: mine.copy_(given), self.inputs, inputs)
        for func, args, kwargs, made in self.calls:
            results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            if made:
                for x, result in zip(made, results, strict=True):
                    x.copy_(result)
        Emulated.replays += 1
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.outputs)


def size_of_outputs(outputs: Any, targets: Tensor) -> Tensor:
    return sum(x.square().mean() for x in tree_leaves(outputs) if isinstance(x, Tensor))


@pytest.mark.parametrize("mixed", [False, True], ids=["assignments", "mixtures"])
@pytest.mark.parametrize("name", [*MODELS, "residual_blocks", "gated", "grouped", "squeeze_and_excite", "named_inputs"])
def test_a_replayed_forward_has_the_same_values(name: str, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(name, 0, sizes=(33,)) if name in MODELS else odd_models.build(name)
    if name not in MODELS:
        data = [(tree_map(lambda x: x.repeat(8, *[1] * (x.dim() - 1)), data[0][0]), data[0][1].repeat(8))]
    ev = smpq_ext.evaluator(model, data, bits=(3, 8), loss=size_of_outputs, fixed={}, renormalize=False)
    lockstep = ev._executor.lockstep
    if lockstep is None:
        pytest.skip("runs by module swap")
    rows = np.random.default_rng(0).integers(0, 2, (9, len(ev.slots))).astype(np.int8)
    if mixed:
        rows = np.where(rows[..., None] == np.arange(2), np.float32(0.75), np.float32(0.25))
    ev.rows_per_batch = 2
    chunks = -(-len(np.unique(rows, axis=0)) // 2)
    expected = ev.by_group(rows)
    monkeypatch.setattr(replay, "Recorded", Emulated)
    monkeypatch.setattr(replay, "Pool", lambda device: None)
    monkeypatch.setattr(lockstep, "asks", False)
    ev._executor.replay = replay.Replay(lockstep, ev.device)
    records, replays = Emulated.count, Emulated.replays
    np.testing.assert_array_equal(ev.by_group(rows), expected)
    assert Emulated.count - records >= chunks
    assert Emulated.replays - replays > Emulated.count - records
