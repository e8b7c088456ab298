"""One QAT step of ResNet-20 (forward, backward, SGD; 64 images of 32 x 32), with torch's fake quantization and ours.

The model is prepared by torch's prepare_qat_fx: "fused" with its default modules, which observe and quantize in one op,
"unfused" with an observer and a fake quantization each. "ours" is `replace_fake_quant`, "patched" torch's modules
inside `patched()`, "off" the same graph with modules that do nothing; all sides take turns, milliseconds are medians.
"vs torch" is torch's time over ours, "vs torch, less off" the same of what each takes more than "off". After the last
round the three quantized models have the same parameters and buffers, bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.ao.quantization import quantize_fx
from torch.nn import functional as F

import smpq_ext
from benchmarks.models import ResNet20
from benchmarks.timing import interleaved, keep_freed_memory

BATCH = 64
ROUNDS = 9
QCONFIGS = {"fused": tq.get_default_qat_qconfig("x86"), "unfused": tq.get_default_qat_qconfig("x86", version=0)}


def prepared(model: nn.Module, kind: str) -> nn.Module:
    """The model with torch's fake-quantize modules."""
    mapping = tq.get_default_qat_qconfig_mapping("x86").set_global(QCONFIGS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return quantize_fx.prepare_qat_fx(model, mapping, torch.randn(1, 3, 32, 32))


def qat_step(model: nn.Module, x: Tensor, targets: Tensor) -> Callable[[], None]:
    """One step of training, on the same batch every time."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("kind", QCONFIGS)
def test_qat_step(benchmark: Any, table: list[dict[str, Any]], kind: str, threads: int) -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    theirs = prepared(ResNet20().train(), kind)
    ours, redirected, off = (copy.deepcopy(theirs) for _ in range(3))
    smpq_ext.replace_fake_quant(ours)
    for module in off.modules():
        if isinstance(module, tq.FakeQuantizeBase):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    inner = qat_step(redirected, *batch)

    def patched_step() -> None:
        with smpq_ext.patched():
            inner()

    sides = {
        "ours": qat_step(ours, *batch),
        "patched": patched_step,
        "torch": qat_step(theirs, *batch),
        "off": qat_step(off, *batch),
    }
    rounds = 1 if benchmark.disabled else ROUNDS
    times = interleaved(sides, rounds)
    for other in (ours, redirected):
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    benchmark.pedantic(sides["ours"], rounds=rounds, warmup_rounds=1)

    row = {
        "modules": kind,
        "threads": threads,
        **{f"{side} ms": 1e3 * seconds for side, seconds in times.items()},
        "vs torch": times["torch"] / times["ours"],
        "vs torch, less off": (times["torch"] - times["off"]) / (times["ours"] - times["off"]),
        "patched vs torch": times["torch"] / times["patched"],
    }
    benchmark.extra_info.update(row)
    table.append(row)
