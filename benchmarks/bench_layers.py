"""One layer for coalitions, 16 rows of 8 images, beside torch: microseconds for one row and image.

Convolutions: ours take codes and give codes, with bias, ReLU and requantization, every row with a weight of its own
variant; "int8" is onednn's convolution with the same for one weight, which cannot write codes of several grids;
"float" is torch's float32 convolution, channels last. "fixed point" and "float" in a name: mixtures of five widths, in
and out. "GMAC/s" are ours. Attention: softmax(q k^T) v of every row, "float" is torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import interleaved, keep_freed_memory
from smpq_ext.engine.fusion import is_depthwise, pack

ROWS, SAMPLES = 16, 8
# Name -> channels in and out, size, kernel, stride, groups, bits of an element.
CONVOLUTIONS = {
    "3x3, 16, 32x32": (16, 16, 32, 3, 1, 1, 8),
    "3x3, 32, 16x16": (32, 32, 16, 3, 1, 1, 8),
    "3x3, 64, 8x8": (64, 64, 8, 3, 1, 1, 8),
    "3x3 stride 2, 16 to 32, 32x32": (16, 32, 32, 3, 2, 1, 8),
    "1x1, 64, 28x28": (64, 64, 28, 1, 1, 1, 8),
    "1x1, 256, 7x7": (256, 256, 7, 1, 1, 1, 8),
    "depthwise, 64, 28x28": (64, 64, 28, 3, 1, 64, 8),
    "3x3 in 32 groups, 128, 14x14": (128, 128, 14, 3, 1, 32, 8),
    "fixed point, 3x3, 16, 32x32": (16, 16, 32, 3, 1, 1, 16),
    "fixed point, 3x3, 64, 8x8": (64, 64, 8, 3, 1, 1, 16),
    "float, 3x3, 16, 32x32": (16, 16, 32, 3, 1, 1, 32),
    "float, 3x3, 64, 8x8": (64, 64, 8, 3, 1, 1, 32),
}
# Name -> heads, tokens, size, causal.
ATTENTIONS = {
    "attention, 8 heads of 8, 191 tokens, causal": (8, 191, 8, True),
    "attention, 4 heads of 24, 64 tokens": (4, 64, 24, False),
    "attention, 12 heads of 64, 197 tokens": (12, 197, 64, False),
}


@pytest.fixture(autouse=True)
def _quiet_memory() -> None:
    keep_freed_memory()
    torch.manual_seed(0)


def report(
    benchmark: Any, table: list[dict[str, Any]], name: str, macs: int, sides: dict[str, Callable[[], object]]
) -> None:
    """Time the sides, and add their row."""
    times = interleaved(sides, 1 if benchmark.disabled else 15)
    benchmark.pedantic(sides["ours"], rounds=1)
    each = {side: 1e6 * t / (ROWS * SAMPLES) for side, t in times.items()}
    row = {"layer": name, "threads": torch.get_num_threads(), "GMAC/s": macs / times["ours"] / 1e9}
    row |= {f"{side} µs": each.get(side) for side in ("ours", "int8", "float")}
    row |= {f"vs {side}": each[side] / each["ours"] if side in each else None for side in ("int8", "float")}
    benchmark.extra_info.update(row)
    table.append(row)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(benchmark: Any, table: list[dict[str, Any]], threads: int, name: str) -> None:
    channels, outs, size, k, stride, groups, bits = CONVOLUTIONS[name]
    pad = k // 2
    weight = torch.randint(-127, 128, (5, outs, channels // groups, k, k))
    rows = torch.arange(ROWS)
    dtypes = {8: (torch.uint8, torch.int8), 16: (torch.int16, torch.int16), 32: (torch.float32, torch.float32)}
    x = torch.randint(0, 256, (ROWS, SAMPLES, size, size, channels)).to(dtypes[bits][0])
    grid = torch.tensor([0.05, 0, 0, 255]).expand(ROWS, 4).contiguous()
    if bits > 8:
        widths = [[0.05, 0, 0, 2**b - 1, 0.2] for b in (2, 3, 4, 6, 8)]
        grid = torch.tensor(widths).expand(ROWS, 5, 5).contiguous()
    start = torch.zeros(ROWS, -(-outs // 16) * 16, dtype=torch.float32 if bits == 32 else torch.int32)
    ours = functools.partial(
        torch.ops.smpq.coalition_convolution,
        *(x, torch.zeros(ROWS, dtype=x.dtype), pack(weight.to(dtypes[bits][1]), groups, 32 // bits), start),
        *(rows, rows % 5, torch.full((ROWS, outs), 1e-4), torch.zeros(ROWS, outs), None, 0.0, None, None),
        *(False, 0.0, math.inf, 0, [k, k, stride, stride, pad, pad, pad, pad, 1, 1], is_depthwise(weight[0], groups)),
        *(False, [rows], [grid], [bits]),
    )
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    kernel = weight[0].float().contiguous(memory_format=torch.channels_last)
    floats = images.float().contiguous(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], object]] = {"ours": ours}
    if bits == 8:
        geometry = [[stride] * 2, [pad] * 2, [1] * 2]
        scales, zeros = torch.full((outs,), 0.01), torch.zeros(outs, dtype=torch.int32)
        packed = torch.ops.onednn.qconv_prepack(
            weight[0].to(torch.int8), scales, 0.1, 0, *geometry, groups, list(images.shape)
        )
        sides["int8"] = functools.partial(
            torch.ops.onednn.qconv_pointwise,
            *(images, 0.1, 0, packed, scales, zeros, None, *geometry, groups, 0.2, 0, torch.uint8, "relu", [], ""),
        )
    sides["float"] = functools.partial(F.conv2d, floats, kernel, None, stride, pad, 1, groups)
    out = (size + 2 * pad - k) // stride + 1
    report(benchmark, table, name, ROWS * SAMPLES * out * out * weight[0].numel(), sides)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(benchmark: Any, table: list[dict[str, Any]], threads: int, name: str) -> None:
    heads, tokens, size, causal = ATTENTIONS[name]
    q, k, v = torch.randn(3, ROWS * SAMPLES, tokens, heads, size).transpose(2, 3)
    rows = torch.arange(ROWS)

    def ours() -> Tensor:
        out: Tensor = torch.ops.smpq.coalition_attention(q, k, v, rows, rows, rows, SAMPLES, causal, size**-0.5)
        return out

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-5)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    report(benchmark, table, name, ROWS * SAMPLES * heads * pairs * 2 * size, {"ours": ours, "float": theirs})
