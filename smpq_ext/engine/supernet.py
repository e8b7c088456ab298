"""The SMPQ supernet: one latent weight per layer, every candidate width at once, mixed by weights that are masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smpq_ext import ops
from smpq_ext.core import Mixtures
from smpq_ext.engine import losses
from smpq_ext.engine.grids import Grids
from smpq_ext.engine.layers import duplicate
from smpq_ext.engine.samples import call

if TYPE_CHECKING:
    from smpq_ext.engine.evaluator import TorchEvaluator


class Supernet:
    """A copy of the model in which every searched slot mixes its candidates; weights learn straight-through.

    Weight steps follow the weights: the calibrated ratio of step to largest weight is kept. Activation steps are
    learned (LSQ). The user's model is not touched.
    """

    def __init__(self, engine: TorchEvaluator) -> None:
        self.engine = engine
        self.model = duplicate(engine.model, share=False)
        self.mixture = torch.empty(0)  # [slots, candidates], or [fixed] of one candidate
        slots = {slot.name: k for k, slot in enumerate(engine.space.slots)}
        self.steps: list[nn.Parameter] = []
        for name in engine.layers:
            module = self.model.get_submodule(name)
            weight, activation = (engine.slot_grids.get(f"{name}.{kind}") for kind in ("weight", "activation"))
            _Mixed(self, module, weight, activation, slots.get(f"{name}.weight"), slots.get(f"{name}.activation"))

    def __call__(self, inputs: Any, mixture: NDArray[np.float32] | Tensor) -> Any:
        """Outputs of the network whose slots are mixed by mixture [slots, candidates]."""
        self.mixture = torch.as_tensor(mixture, dtype=torch.float32, device=self.engine.device)
        return call(self.model, inputs)

    def train(
        self, mixture: NDArray[np.float32], steps: int, batch: int, rate: float, rng: np.random.Generator
    ) -> None:
        """`steps` of SGD (cosine, momentum 0.9, weight decay 3e-4, gradients clipped at 5) on the calibration data."""
        parameters = [p for p in self.model.parameters() if p.is_floating_point()]
        optimizer = torch.optim.SGD(
            [{"params": parameters, "weight_decay": 3e-4}, {"params": self.steps, "lr": 0.1 * rate}],
            lr=rate,
            momentum=0.9,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        self.model.train()
        for _ in range(steps):
            part = self.draw(batch, rng)
            with torch.enable_grad():
                loss = self.engine.loss_fn(self(part.inputs, mixture), part.targets)
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
        self.model.eval()

    def draw(self, samples: int, rng: np.random.Generator) -> Any:
        """A random batch of at most so many samples of one calibration batch."""
        batches = self.engine.batches
        sizes = np.array([b.size for b in batches])
        batch = batches[rng.choice(len(batches), p=sizes / sizes.sum())]
        index = np.sort(rng.permutation(batch.size)[:samples])
        return batch.take(torch.from_numpy(index))

    def values(self, mixtures: Mixtures, part: Any) -> NDArray[np.float64]:
        """Top-1 in percent of the masked networks [n] on one batch; 100 * exp(-loss) where there are no classes."""
        found = []
        with torch.no_grad():
            for mixture in mixtures:
                output = self(part.inputs, mixture)
                classes = self._classes(output, part.targets)
                if classes is not None:
                    found.append(100.0 * float((output.argmax(-1) == classes).float().mean()))
                else:
                    found.append(100.0 * float(torch.exp(-self.engine.loss_fn(output, part.targets))))
        return np.array(found, np.float64)

    def _classes(self, output: Any, targets: Any) -> Tensor | None:
        """The right classes for an output [..., classes]: the targets, or the float model's choice with the KL loss."""
        if not isinstance(output, Tensor) or not isinstance(targets, Tensor):
            return None
        if self.engine.loss_fn is losses.kl:
            return targets.argmax(-1)
        return targets if not targets.is_floating_point() and targets.shape == output.shape[:-1] else None


class _Mixed:
    """Takes the place of a layer's forward in the supernet."""

    def __init__(
        self,
        net: Supernet,
        module: nn.Module,
        weight: Grids | None,
        activation: Grids | None,
        weight_slot: int | None,
        activation_slot: int | None,
    ) -> None:
        self.net, self.module, self.original = net, module, module.forward
        self.weight, self.activation = weight, activation
        self.weight_slot, self.activation_slot = weight_slot, activation_slot
        if weight is not None:
            top = self._top(module.weight)
            self.ratio = weight.scale / top
        if activation is not None:
            self.step = nn.Parameter(activation.scale.clone())
            net.steps.append(self.step)
        module.forward = self  # type: ignore[method-assign, assignment]

    def _top(self, weight: Tensor) -> Tensor:
        assert self.weight is not None and self.weight.axis is not None
        top = weight.detach().movedim(self.weight.axis, 0).flatten(1).abs().amax(1)
        return torch.where(top > 0, top, 1.0)

    def _mixture(self, slot: int | None, candidates: int) -> Tensor:
        mixture = self.net.mixture
        return mixture.new_ones(1, 1) if slot is None else mixture[slot : slot + 1, :candidates]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.activation is not None:
            g = self.activation
            mixture = self._mixture(self.activation_slot, len(g.scale))
            step = self.step.abs() + 1e-8
            x = ops.coalition_fake_quantize(x, step, g.zero_point, g.quant_min, g.quant_max, mixture)[0]
        if self.weight is None:
            return self.original(x, *args, **kwargs)
        g, own = self.weight, self.module._parameters["weight"]
        assert own is not None
        mixture = self._mixture(self.weight_slot, len(g.scale))
        scale = self.ratio * self._top(own)
        mixed = ops.coalition_fake_quantize(own, scale, g.zero_point, g.quant_min, g.quant_max, mixture, axis=g.axis)[0]
        self.module._parameters["weight"] = mixed  # type: ignore[assignment]
        try:
            return self.original(x, *args, **kwargs)
        finally:
            self.module._parameters["weight"] = own
