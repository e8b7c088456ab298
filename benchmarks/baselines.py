"""What users write today to evaluate coalitions: a copy of the model, one coalition after another, torch's own ops."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from smpq_ext.engine.evaluator import TorchEvaluator
from smpq_ext.engine.grids import Grids

KINDS = {
    "B2": "every weight and activation by torch's fake-quantize ops with a float zero point",
    "B2 mixture": "the same for every candidate, multiplied by its share and added up",
    "B3": "clamp(round) and a bank of weights under torch.compile",
    "B4": "all weights at all widths in a bank, activations by torch's op",
    "B5": "the bank under torch.func.vmap, eight coalitions at once",
    "B6": "as B3, in a CUDA graph",
}
TOGETHER = 8  # coalitions, in B5


class Fixed:
    """Grids as torch's ops want them, float zero points where they take them, and codes that are no device's."""

    def __init__(self, grids: Grids) -> None:
        self.scale, self.axis = grids.scale, grids.axis
        whole = self.scale.is_cuda and self.axis is None  # all that CUDA's op for a whole tensor takes
        self.zero_point = grids.zero_point.to(torch.int32 if whole else torch.float32)
        self.codes = list(zip(grids.quant_min.tolist(), grids.quant_max.tolist(), strict=True))

    def quantize(self, x: Tensor, candidate: int) -> Tensor:
        scale, zero, codes = self.scale[candidate], self.zero_point[candidate], self.codes[candidate]
        if self.axis is None:  # the overload by name: a whole number on a device would be read by the host
            return torch.ops.aten.fake_quantize_per_tensor_affine.tensor_qparams(x, scale, zero, *codes)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, self.axis, *codes)


class Quantized(nn.Module):
    """A convolution or linear layer whose widths are those of its owner's row."""

    def __init__(self, owner: Baseline, module: Any, name: str) -> None:
        super().__init__()
        self.owner = [owner]  # in a list: no submodule
        self.layer, self.kind = module, owner.kind
        grids, slots = owner.evaluator.slot_grids, owner.evaluator.slots
        self.weight_grids, self.activation_grids = (
            None if g is None else Fixed(g) for g in (grids.get(f"{name}.weight"), grids.get(f"{name}.activation"))
        )
        self.slots = tuple(slots.index(s) if s in slots else -1 for s in (f"{name}.weight", f"{name}.activation"))
        if self.weight_grids is not None and not self.kind.startswith("B2"):
            widths = range(len(self.weight_grids.codes))
            bank = torch.stack([self.on_grid(module.weight.detach(), self.weight_grids, c) for c in widths])
            if bank.dim() == 5:  # every variant with its channels last
                bank = bank.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
            self.bank = bank
        if self.activation_grids is not None:
            g = grids[f"{name}.activation"]
            self.scale, self.zero_point, self.quant_min, self.quant_max = (
                x.float() for x in (g.scale, g.zero_point, g.quant_min, g.quant_max)
            )

    def forward(self, x: Tensor) -> Tensor:
        w, a = (self.owner[0].row[s] if s >= 0 else 0 for s in self.slots)
        weight = self.layer.weight
        if self.weight_grids is not None:
            weight = self.on_grid(weight, self.weight_grids, w) if self.kind.startswith("B2") else _pick(self.bank, w)
        if self.activation_grids is not None:
            x = self.by_formula(x, a) if self.kind in ("B3", "B5", "B6") else self.on_grid(x, self.activation_grids, a)
        m = self.layer
        if isinstance(m, nn.Linear):
            return F.linear(x, weight, m.bias)
        return F.conv2d(x, weight, m.bias, m.stride, m.padding, m.dilation, m.groups)

    def on_grid(self, x: Tensor, grids: Fixed, candidate: Any) -> Tensor:
        """x on one grid, or, where the row is a mixture, the sum of all grids by their shares [candidates]."""
        if np.ndim(candidate):
            total = self.on_grid(x, grids, 0).mul_(float(candidate[0]))
            for c, share in enumerate(candidate[1 : len(grids.codes)], start=1):
                total.add_(self.on_grid(x, grids, c), alpha=float(share))
            return total
        return grids.quantize(x, candidate)

    def by_formula(self, x: Tensor, a: Any) -> Tensor:
        fields = self.scale, self.zero_point, self.quant_min, self.quant_max
        scale, zero, low, high = (_pick(field, a) for field in fields)
        return (torch.minimum(torch.maximum(torch.round(x / scale) + zero, low), high) - zero) * scale


def _pick(bank: Tensor, index: Any) -> Tensor:
    """An entry of the bank; a tensor's index is not read, so that it can be traced."""
    return bank.index_select(0, index.view(1))[0] if isinstance(index, Tensor) else bank[index]


class Baseline:
    """One of KINDS for the model, grids, loss and data of an evaluator; channels last where there are planes."""

    def __init__(self, evaluator: TorchEvaluator, kind: str) -> None:
        self.evaluator, self.kind = evaluator, kind
        self.row: Any = np.zeros(len(evaluator.slots), np.int64)
        self.model = copy.deepcopy(evaluator.model).eval().requires_grad_(False)
        (batch,) = evaluator.batches
        self.inputs, self.targets = batch.inputs, batch.targets
        if any(isinstance(m, nn.Conv2d) for m in self.model.modules()):
            self.model = self.model.to(memory_format=torch.channels_last)
            self.inputs = self.inputs.contiguous(memory_format=torch.channels_last)
        for name in evaluator.layers:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, Quantized(self, self.model.get_submodule(name), name))
        if evaluator.renormalize:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):  # batch statistics, and none kept
                    module.running_mean = module.running_var = None
                    module.track_running_stats = False
                    module.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of itself
            mode = {"B3": "default", "B6": "reduce-overhead"}.get(kind)
            self.compiled = torch.compile(self._of_row, dynamic=False, mode=mode) if mode else None

    @torch.no_grad()
    def losses(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """The losses [n] of assignments [n, slots], or of mixtures [n, slots, candidates]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of itself, compiling and batching
            outputs = self._outputs(rows)
        return np.array([float(self.evaluator.loss_fn(y, self.targets)) for y in outputs])

    def _outputs(self, rows: NDArray[Any]) -> list[Tensor]:
        if self.kind == "B5" or self.compiled is not None:
            there = torch.from_numpy(rows.astype(np.int64)).to(self.evaluator.device)
            if self.kind == "B5":
                return [y for chunk in there.split(TOGETHER) for y in torch.func.vmap(self._of_row)(chunk)]
            return [self.compiled(row).clone() for row in there]  # a graph's outputs are written again
        return [self._of_row(row) for row in rows]

    def _of_row(self, row: Any) -> Tensor:
        self.row = row
        return self.model(self.inputs)
