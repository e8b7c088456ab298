"""What the engine must give: a plain loop over torch's own fake-quantize functions, one coalition after the other."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from smpq_ext.core import Grid
from smpq_ext.engine.samples import call, concatenate


def torch_quantize(x: Tensor, grid: Grid) -> Tensor:
    """torch's own fake quantization; one bit, which it has no grid for, by hand."""
    if (grid.zero_point == -0.5).all():
        shape = [-1 if d == grid.axis else 1 for d in range(x.dim())]
        return torch.where(x >= 0, 0.5, -0.5) * torch.from_numpy(grid.scale).to(x).reshape(shape)
    if grid.axis is None:
        return torch.fake_quantize_per_tensor_affine(
            x, float(grid.scale), int(grid.zero_point), grid.quant_min, grid.quant_max
        )
    scale, zero = torch.from_numpy(grid.scale).to(x.device), torch.from_numpy(grid.zero_point).int().to(x.device)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, grid.axis, grid.quant_min, grid.quant_max)


def oracle(ev: Any, mixture: np.ndarray) -> float:
    """The value of one mixture [slots, candidates], by a copy of the model, one layer after the other."""
    model = copy.deepcopy(ev.model).eval()
    weights = {slot.name: np.ones(1) for slot, width in ev.space.fixed if width != 32}
    weights |= {name: mixture[k] for k, name in enumerate(ev.slots)}

    def mixed(x: Tensor, slot: str) -> Tensor:
        if slot not in weights:
            return x
        pairs = zip(weights[slot], ev.grids[slot], strict=False)
        return sum((float(w) * torch_quantize(x, grid) for w, grid in pairs if w != 0), torch.zeros_like(x))

    originals = {name: model.get_submodule(name).weight.detach().clone() for name in ev.layers}
    for name in ev.layers:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(mixed(originals[name], f"{name}.weight"))
        layer.register_forward_pre_hook(lambda _, args, name=name: (mixed(args[0], f"{name}.activation"), *args[1:]))
    batches = [(b.inputs, b.targets) for b in ev.batches]
    if ev.renormalize:
        whole = concatenate(ev.batches)
        batches = [(whole.inputs, whole.targets)]
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
    total = samples = 0.0
    with torch.no_grad():
        for inputs, targets in batches:
            out = call(model, inputs)
            loss = F.cross_entropy(out.flatten(0, -2), targets.flatten())
            total, samples = total + float(loss) * len(targets), samples + len(targets)
    return -total / samples


def random_assignments(ev: Any, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, ev.space.highest() + 1, (n, len(ev.slots))).astype(np.int8)


def random_mixtures(ev: Any, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = rng.random((n, *ev.space.mask.shape)) * (rng.random((n, *ev.space.mask.shape)) < 0.6) * ev.space.mask
    return weights.astype(np.float32)
