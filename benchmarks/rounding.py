"""How far rounding moves a loss: the integer path, and floating point with another order of additions.

Random assignments at each budget, weights and activations from {2, 3, 4, 6, 8} bits. "flips": the share of activation
codes, over all layers, that differ from those of the floating path. "integer", "other order": the median and the
largest change of the loss against that path, as shares, of the integer path, and of floating point without oneDNN,
which adds the same products in another order. "standard error": of the loss over its samples, as a share, for scale.

    python -m benchmarks.rounding
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import smpq_ext
from benchmarks import data, models
from benchmarks.environment import save_table
from smpq_ext import budget as budgets
from smpq_ext.engine import executor
from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.engine.lockstep import Lockstep
from smpq_ext.games import BudgetGame

ROWS = 8
BITS = (2, 3, 4, 6, 8)
BUDGETS = (2.5, 3, 4)


def cases() -> dict[str, TorchEvaluator]:
    images, labels = data.cifar10_kept_out()
    resnet: dict[str, Any] = {"model": models.load_resnet20_jpeg(), "data": [(images[:256], labels[:256])]}
    mobilenet: dict[str, Any] = {"model": models.load_mobilenet(), "data": [data.imagenet_sample(step=32)]}
    return {
        "ResNet-20, kept": smpq_ext.evaluator(**resnet, bits=BITS, renormalize=False),
        "ResNet-20, re-estimated": smpq_ext.evaluator(**resnet, bits=BITS, renormalize=True),
        "MobileNet v1, re-estimated": smpq_ext.evaluator(**mobilenet, bits=BITS, renormalize=True),
    }


def floating(ev: TorchEvaluator, rows: NDArray[np.int8], onednn: bool = True) -> NDArray[np.float64]:
    """Losses by group of the floating path, [n, groups]."""
    lockstep = ev._executor.lockstep
    with mock.patch.multiple(lockstep, integer=None, floating=None), torch.backends.mkldnn.flags(enabled=onednn):
        return -ev.by_group(rows)


def flips(ev: TorchEvaluator, row: NDArray[np.int8]) -> float:
    """The share of activation codes that differ between the two paths."""
    ours: dict[str, list[Tensor]] = {}  # by layer, a piece of the samples each
    theirs: dict[str, list[Tensor]] = {}
    lockstep = ev._executor.lockstep
    assert lockstep is not None and lockstep.integer is not None
    run_fused, run_layer = Lockstep._fused, executor.QuantizedLayer.by_row
    quantize = executor.ops.coalition_fake_quantize

    def run(self: Lockstep, last: int, values: Any, codes: dict[int, Tensor]) -> Any:
        fused = lockstep.integer.fused[last]
        if fused.step not in codes:
            self._quantize(fused.source, values[fused.source], codes)
        ours.setdefault(fused.layer.layer.name, []).append(codes[fused.step][0].clone())
        return run_fused(self, last, values, codes)

    def by_row(self: Any, *arguments: Any) -> Tensor:
        def record(*given: Any, **named: Any) -> Tensor:
            rows = quantize(*given, **named)
            candidate = int(given[5].argmax())
            g = self.activation
            code = (rows / g.scale[candidate]).round() + g.zero_point[candidate]
            theirs.setdefault(self.name, []).append(code[0].to(torch.uint8))
            return rows

        with mock.patch.object(executor.ops, "coalition_fake_quantize", record):
            return run_layer(self, *arguments)

    with mock.patch.object(Lockstep, "_fused", run):
        ev(row[None])
    with mock.patch.object(executor.QuantizedLayer, "by_row", by_row):
        floating(ev, row[None])
    different = total = 0
    for name, pieces in theirs.items():
        for mine, code in zip(ours[name], pieces, strict=True):  # mine: channels last, up to a multiple of 4
            other = code.permute(0, 2, 3, 1) if code.dim() == 4 else code.view(*mine.shape[:3], -1)
            other = other[:, : mine.shape[1], : mine.shape[2]]  # without the zeros of the model's own, on the far sides
            different += int((mine[..., : other.shape[-1]] != other).sum())
            total += other.numel()
    return different / total


def main() -> None:
    rows = []
    for name, ev in cases().items():
        for bits in BUDGETS:
            limit = budgets.parse(f"weight-bits={bits},activation-bits={bits}", ev.space)
            level = np.searchsorted(BITS, bits, "right") - 1
            start = np.minimum(ev.space.lowest() + level, ev.space.highest())
            drawn = BudgetGame(ev, limit, start, moves=4 * len(start)).draw(ROWS, np.random.default_rng(0))
            expected = floating(ev, drawn)
            reference = expected @ ev.groups
            error = (expected.std(axis=1, ddof=1) / len(ev.groups) ** 0.5 / reference).mean()
            integer = np.abs(-ev(drawn) / reference - 1)
            other = np.abs(floating(ev, drawn, onednn=False) @ ev.groups / reference - 1)
            rows.append(
                {
                    "model": name,
                    "bits": bits,
                    "loss": float(reference.mean()),
                    "flips": float(np.mean([flips(ev, row) for row in drawn[:2]])),
                    "integer, median": float(np.median(integer)),
                    "integer, largest": float(integer.max()),
                    "other order, median": float(np.median(other)),
                    "other order, largest": float(other.max()),
                    "standard error": float(error),
                }
            )
            print(rows[-1], flush=True)
    save_table("rounding", rows, __doc__ or "")


if __name__ == "__main__":
    main()
