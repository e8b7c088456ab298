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

torch.set_num_threads(1)
torch.ops.load_library(os.environ["SMPQ_EMULATED_LIBRARY"])
OPS = ("coalition_convolution", "coalition_epilogue")


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """From here on the ops are the CUDA kernels, and are counted."""
    calls: Counter[str] = Counter()

    def counted(op: str) -> Any:
        kernel = getattr(torch.ops.smpq_emulated, op)

        def call(*arguments: Any) -> Any:
            calls[op, str(arguments[0].dtype)] += 1
            return kernel(*arguments)

        return call

    for op in OPS:
        monkeypatch.setattr(torch.ops.smpq, op, counted(op))
    return calls


@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
@pytest.mark.parametrize("name", ["Branches", "Tokens"])
def test_assignments_have_the_values_of_the_cpu(name: str, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(name, 0, sizes=(9,))
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 8), renormalize=renormalize, fixed={})
    assert ev._executor.lockstep is not None and ev._executor.lockstep.integers
    rows = np.random.default_rng(0).integers(0, ev.space.highest() + 1, (5, len(ev.slots))).astype(np.int8)
    on_cpu = ev.by_group(rows)
    calls = counting(monkeypatch)
    on_cuda = ev.by_group(rows)
    assert calls["coalition_convolution", "torch.uint8"] >= len(ev._executor.lockstep.integers)
    assert calls["coalition_epilogue", "torch.float32"]
    # Sums of floats are added up in another order; where all layers run on codes, nothing differs.
    exact = not calls["coalition_convolution", "torch.float32"]
    np.testing.assert_allclose(on_cuda, on_cpu, rtol=0 if exact else 1e-5)


@pytest.mark.parametrize("mixture_bits", [16, 32])
@pytest.mark.parametrize("renormalize", [False, True], ids=["kept", "re-estimated"])
@pytest.mark.parametrize("name", ["Branches", "Tokens"])
def test_mixtures_have_the_values_of_the_cpu(
    name: str, renormalize: bool, mixture_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = build(name, 1, sizes=(7,))
    ev = smpq_ext.evaluator(model, data, bits=(2, 3, 8), renormalize=renormalize, fixed={}, mixture_bits=mixture_bits)
    rng = np.random.default_rng(0)
    rows = ev.space.one_hot(np.stack([rng.integers(0, ev.space.highest() + 1) for _ in range(4)]))
    rows = (rows + rows[::-1]) / 2
    on_cpu = ev(rows)
    calls = counting(monkeypatch)
    on_cuda = ev(rows)
    assert calls["coalition_convolution", "torch.int16" if mixture_bits == 16 else "torch.float32"]
    np.testing.assert_allclose(on_cuda, on_cpu, rtol=1e-3)  # a rounding tie may fall to the other side
