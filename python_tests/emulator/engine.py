"""The engine with the CUDA kernels in place of the CPU's, on the emulator. Run by test_emulated.py."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import smpq_ext
from python_tests.random_models import build
from smpq_ext.engine import trials

torch.set_num_threads(1)
torch.ops.load_library(os.environ["SMPQ_EMULATED_LIBRARY"])
OPS = ("coalition_convolution", "coalition_epilogue")


def only_codes(layer: Any) -> None:
    raise ValueError("on CUDA the kernel multiplies codes alone")


@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
@pytest.mark.parametrize("name", ["Branches", "Tokens"])
def test_values_are_those_of_the_cpu(name: str, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "FloatLayer", only_codes)
    model, data = build(name, 0, sizes=(9,))
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 8), renormalize=renormalize, fixed={})
    assert ev._executor.lockstep is not None and ev._executor.lockstep.integers
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (5, len(ev.slots))).astype(np.int8)
    on_cpu = ev.by_group(rows)
    calls: Counter[str] = Counter()

    def counted(op: str) -> Any:
        kernel = getattr(torch.ops.smpq_emulated, op)

        def call(*arguments: Any) -> Any:
            calls[op] += 1
            return kernel(*arguments)

        return call

    for op in OPS:
        monkeypatch.setattr(torch.ops.smpq, op, counted(op))
    on_cuda = ev.by_group(rows)
    assert calls["coalition_convolution"] >= len(ev._executor.lockstep.integers) and calls["coalition_epilogue"]
    np.testing.assert_array_equal(on_cuda, on_cpu)
