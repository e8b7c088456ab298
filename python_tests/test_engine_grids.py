"""Calibration: every grid is within its codes, the search is never worse than min-max, and odd tensors work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from smpq_ext import ops
from smpq_ext.engine.grids import Grids, Observed, activation_grids, weight_grids
from smpq_ext.engine.layers import channel_axis

WIDTHS = (1, 2, 3, 5, 8, 16)
few = settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)


def quantized(x: Tensor, grids: Grids) -> Tensor:
    """[candidates, *x.shape]"""
    mixtures = torch.eye(len(grids.scale))
    return ops.coalition_fake_quantize(
        x, grids.scale, grids.zero_point, grids.quant_min, grids.quant_max, mixtures, axis=grids.axis
    )


def errors(x: Tensor, grids: Grids) -> Tensor:
    return (quantized(x, grids) - x).double().square().flatten(1).sum(1)


def observed(*tensors: Tensor, limit: int = 1 << 18) -> Observed:
    seen = Observed()
    for x in tensors:
        seen.add(x, limit)
    return seen


@few
@given(st.integers(0, 10_000), st.sampled_from([0, 1]), st.floats(-3, 3))
def test_weight_grids(seed: int, axis: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(6, 5, 3, generator=generator) * 10**scale
    w[0, 0] *= 8  # an outlier
    found = {how: weight_grids(w, axis, WIDTHS, how) for how in ("mse", "minmax", "percentile")}
    for grids in found.values():
        assert grids.scale.shape == grids.zero_point.shape == (len(WIDTHS), w.shape[axis])
        assert (grids.quant_max - grids.quant_min == torch.tensor([max(1, 2**b - 2) for b in WIDTHS])).all()
        wide = weight_grids(w, axis, WIDTHS, "mse", both_signs=True)
        assert (
            wide.quant_max - wide.quant_min == torch.tensor([2**b - 1 if b <= 4 else 2**b - 2 for b in WIDTHS])
        ).all()
        assert (grids.scale > 0).all()
        other = w.movedim(axis, 0).abs().flatten(1).mean(1)
        torch.testing.assert_close(quantized(w, grids)[0].abs().movedim(axis, 0).flatten(1)[:, 0], other)
    mse, minmax = (errors(w, found[how]) for how in ("mse", "minmax"))
    assert (mse <= minmax * (1 + 1e-6) + 1e-12).all()
    assert (mse[1:] <= mse[:-1]).all()
    assert mse[1] < minmax[1]
    step = found["minmax"].scale.unsqueeze(-1)
    rows = (quantized(w, found["minmax"]) - w).abs().movedim(axis + 1, 1).flatten(2)
    assert (rows[1:] <= step[1:] / 2 * (1 + 1e-2)).all()  # nothing is clipped; at 16 bits float32 rounds too


@few
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(-1, 1))
def test_activation_grids(seed: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(40, 50, generator=generator) + shift) * 10**scale
    for y, unsigned in ((x, False), (x.relu(), True), (nn.functional.gelu(x), False), (-x.relu(), False)):
        found = {how: activation_grids(observed(y), WIDTHS, how) for how in ("mse", "minmax", "percentile")}
        for grids in found.values():
            assert grids.zero_point.dtype == torch.int32
            assert ((grids.zero_point >= grids.quant_min) & (grids.zero_point <= grids.quant_max)).all()
            assert not unsigned or (grids.zero_point == 0).all()
            assert (quantized(torch.zeros(1), grids) == 0).all()  # 0 is on every grid
        mse, minmax = (errors(y, found[how]) for how in ("mse", "minmax"))
        assert (mse <= minmax * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("how", ["mse", "minmax", "percentile"])
def test_zeros_and_constants(how: str) -> None:
    w = torch.randn(4, 8)
    w[1] = 0
    grids = weight_grids(w, 0, WIDTHS, how)  # type: ignore[arg-type]
    assert torch.isfinite(grids.scale).all()
    assert (quantized(w, grids)[:, 1] == 0).all()
    for constant in (0.0, 3.7, -2.5):
        x = torch.full((5, 6), constant)
        grids = activation_grids(observed(x), WIDTHS, how)  # type: ignore[arg-type]
        torch.testing.assert_close(quantized(x, grids), x.expand(len(WIDTHS), 5, 6), rtol=1e-5, atol=0)


def test_percentile_clips_what_min_max_keeps() -> None:
    x = torch.rand(100_000)
    x[17] = 100
    wide, narrow = (activation_grids(observed(x), (8,), how).scale.item() for how in ("minmax", "percentile"))
    assert wide == pytest.approx(100 / 255)
    assert narrow == pytest.approx(1 / 255, rel=0.01)


def test_observations_are_few_and_the_range_is_true() -> None:
    x = torch.randn(8, 16, 32, 32)
    x[3, 5, 7, 11] = 50
    seen = observed(x, -x, limit=1000)
    assert (seen.low, seen.high) == (-50, 50)
    assert seen.sample is not None
    assert 1500 < seen.sample.numel() <= 2000
    channels = set((np.arange(0, x.numel(), (-(-x.numel() // 1000)) | 1) // 1024 % 16).tolist())
    assert channels == set(range(16))


def test_axes_of_transposed_convolutions() -> None:
    assert channel_axis(nn.ConvTranspose2d(4, 6, 3)) == 1
    assert channel_axis(nn.ConvTranspose2d(4, 6, 3, groups=2)) is None
    assert channel_axis(nn.ConvTranspose2d(4, 4, 3, groups=4)) == 0
    assert channel_axis(nn.Conv2d(4, 4, 3, groups=4)) == 0


def test_half_precision_models_keep_float_scales() -> None:
    w = torch.randn(4, 8, dtype=torch.bfloat16)
    assert weight_grids(w, 0, (2, 8), "mse").scale.dtype == torch.float32
    grids = activation_grids(observed(torch.randn(100).bfloat16()), (2, 8), "mse")
    assert grids.scale.dtype == torch.float32
