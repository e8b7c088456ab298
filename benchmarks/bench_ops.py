"""The ops beside a copy of the same bytes and beside torch's own ops; what a call reads and writes fits no cache.

All sides take turns; milliseconds are medians; GB/s counts every byte read or written once. torch's ops get a float
zero point and run without gradients. "of clone" is the share of torch.clone's bandwidth that the op reaches, "of copy_"
the same for a copy into memory that was there before; "vs torch" is torch's time over ours. Freed memory is kept, so
that no side pays for page faults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.timing import interleaved, keep_freed_memory
from smpq_ext import ops

BITS = (2, 3, 4, 6, 8)
ROUNDS = 15


@dataclass(frozen=True)
class Comparison:
    """Calls that do the same work, with the bytes ours must move, and what we want of the ratios (None: anything)."""

    ours: Callable[[], object]
    torch: Callable[[], object]
    bytes: int
    clone: Callable[[], object] | None = None
    copy: Callable[[], object] | None = None
    of_clone: float | None = None
    vs_torch: float | None = None


@dataclass(frozen=True)
class Operands:
    """A tensor with a max-abs grid for each of BITS, [candidates] or, per channel of axis 0, [candidates, channels]."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: Tensor
    quant_max: Tensor
    axis: int | None

    @classmethod
    def random(cls, rows: int, dtype: torch.dtype, axis: int | None) -> Operands:
        x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
        low, high = (torch.tensor(codes, dtype=torch.int32) for codes in zip(*map(ops.bounds, BITS), strict=True))
        largest = x.abs().amax() if axis is None else x.abs().amax(1)
        scale = torch.stack([largest.float() / h for h in high])
        return cls(x, scale, torch.zeros_like(scale), low, high, axis)

    def torch_op(self, c: int) -> Tensor:
        """torch's fake-quantize of x on grid c."""
        low, high = int(self.quant_min[c]), int(self.quant_max[c])
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(self.x, self.scale[c], self.zero_point[c], low, high)
        return torch.fake_quantize_per_channel_affine(self.x, self.scale[c], self.zero_point[c], self.axis, low, high)


def fake_quantize(dtype: torch.dtype, axis: int | None, asymmetric: bool = False) -> Comparison:
    """One width; where asymmetric, ours gets the float zero point that torch's always has."""
    o = Operands.random(4096, dtype, axis)
    c = BITS.index(4)
    low, high = int(o.quant_min[c]), int(o.quant_max[c])
    zero_point = o.zero_point[c] if asymmetric else None
    out = torch.empty_like(o.x)
    return Comparison(
        ours=lambda: ops.fake_quantize(o.x, o.scale[c], zero_point, quant_min=low, quant_max=high, axis=axis),
        torch=lambda: o.torch_op(c),
        bytes=2 * o.x.nbytes,
        clone=o.x.clone,
        copy=lambda: out.copy_(o.x),
        of_clone=0.8,
        vs_torch=8,
    )


def mixture(dtype: torch.dtype, axis: int | None) -> Comparison:
    """One coalition that mixes five widths, against five torch ops multiplied and added up in place."""
    o = Operands.random(4096, dtype, axis)
    weights = [0.1, 0.15, 0.2, 0.25, 0.3]
    mixtures = torch.tensor([weights])
    out = torch.empty_like(o.x)

    def five_ops() -> Tensor:
        total = o.torch_op(0).mul_(weights[0])
        for c, weight in enumerate(weights[1:], start=1):
            total.add_(o.torch_op(c), alpha=weight)
        return total

    return Comparison(
        ours=lambda: ops.coalition_fake_quantize(o.x, o.scale, None, o.quant_min, o.quant_max, mixtures, axis=axis),
        torch=five_ops,
        bytes=2 * o.x.nbytes,
        clone=o.x.clone,
        copy=lambda: out.copy_(o.x),
        of_clone=0.7,
        vs_torch=25,
    )


def one_hot(dtype: torch.dtype, axis: int | None) -> Comparison:
    """Eight coalitions of one width each, against eight torch ops (that need not be stacked)."""
    o = Operands.random(1024, dtype, axis)
    picks = [0, 1, 2, 3, 4, 0, 2, 4]
    mixtures = torch.eye(len(BITS))[picks]
    copies = o.x.expand(len(picks), *o.x.shape)
    out = torch.empty(copies.shape, dtype=dtype)
    return Comparison(
        ours=lambda: ops.coalition_fake_quantize(o.x, o.scale, None, o.quant_min, o.quant_max, mixtures, axis=axis),
        torch=lambda: [o.torch_op(c) for c in picks],
        bytes=(1 + len(picks)) * o.x.nbytes,
        clone=lambda: copies.clone(memory_format=torch.contiguous_format),
        copy=lambda: out.copy_(copies),
    )


def quantization_error(dtype: torch.dtype, axis: int | None) -> Comparison:
    """The squared errors of five widths, against one torch fake-quantize of one width, error not even taken."""
    o = Operands.random(4096, dtype, axis)
    return Comparison(
        ours=lambda: ops.quantization_error(o.x, o.scale, None, o.quant_min, o.quant_max, axis=axis),
        torch=lambda: o.torch_op(0),
        bytes=o.x.nbytes,
        vs_torch=1,
    )


CASES: dict[str, Callable[[torch.dtype, int | None], Comparison]] = {
    "fake_quantize": fake_quantize,
    "fake_quantize, float zero point": partial(fake_quantize, asymmetric=True),
    "coalition, 5 widths mixed, n = 1": mixture,
    "coalition, one-hot, n = 8": one_hot,
    "quantization_error, 5 widths": quantization_error,
}


@pytest.mark.parametrize("axis", [None, 0], ids=["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_op(
    benchmark: Any, table: list[dict[str, Any]], name: str, dtype: torch.dtype, axis: int | None, threads: int
) -> None:
    keep_freed_memory()
    comparison = CASES[name](dtype, axis)
    rounds = 1 if benchmark.disabled else ROUNDS
    sides = {side: getattr(comparison, side) for side in ("ours", "clone", "copy", "torch")}
    times = interleaved({side: call for side, call in sides.items() if call is not None}, rounds)
    benchmark.pedantic(comparison.ours, rounds=rounds, warmup_rounds=1)

    ours, torch_time = times["ours"], times["torch"]
    of_clone = times["clone"] / ours if "clone" in times else None
    ratios = {"clone": (of_clone, comparison.of_clone), "torch": (torch_time / ours, comparison.vs_torch)}
    wanted = {other: (ratio, least) for other, (ratio, least) in ratios.items() if ratio and least}
    row = {
        "op": name,
        "dtype": str(dtype).removeprefix("torch."),
        "grid per": "tensor" if axis is None else "channel",
        "threads": threads,
        "ms": 1e3 * ours,
        "GB/s": comparison.bytes / ours / 1e9,
        "clone GB/s": comparison.bytes / times["clone"] / 1e9 if "clone" in times else None,
        "of clone": of_clone,
        "of copy_": times["copy"] / ours if "copy" in times else None,
        "torch ms": 1e3 * torch_time,
        "vs torch": torch_time / ours,
        "wanted": ", ".join(f"{least} x {other}" for other, (_, least) in wanted.items()) or None,
        "met": all(ratio >= least for ratio, least in wanted.values()) if wanted else None,
    }
    benchmark.extra_info.update(row)
    table.append(row)
