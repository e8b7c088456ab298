"""Gradients: scores of the float model, for the methods that need no coalition, and derivatives by mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from smpq_ext import ops
from smpq_ext.core import Grid, Mixtures
from smpq_ext.engine import losses
from smpq_ext.engine.layers import duplicate
from smpq_ext.engine.samples import call
from smpq_ext.engine.supernet import Supernet

if TYPE_CHECKING:
    from smpq_ext.engine.evaluator import TorchEvaluator

STEP = 32  # samples whose gradients are taken together
FEW = 32  # samples that derivatives by mixtures are taken of: what they are for is not better with more

Differentiate = Callable[[Tensor, list[Tensor]], list[Tensor]]  # loss, tensors -> one tensor for each


def squared_gradients(engine: TorchEvaluator) -> NDArray[np.float64]:
    """1/2 E[(gradient * error)^2] of each (slot, candidate), [slots, candidates]; the expectation is over samples.

    With the KL loss, whose gradient is 0 at the float model, the labels are drawn from the model's own output: then
    the expected square is the true Fisher information, the Hessian of the KL.
    """
    generator = torch.Generator().manual_seed(0)

    def fisher(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g * g for g, t in zip(gradients, tensors, strict=True)]

    scores = np.zeros(engine.space.mask.shape)
    samples = sum(batch.size for batch in engine.batches)
    for size, kinds in _passes(engine, fisher, lambda output, target: _label_loss(engine, output, target, generator)):
        # A mean loss over `size` samples: its gradient for one sample's activation is 1/size of the sample's own, and
        # for a weight the mean of about independent ones, whose square is 1/size of theirs.
        for slot, score in _contract(engine, kinds):
            scores[slot] += 0.5 * score * size * size / samples
    return scores


def hessian_scores(engine: TorchEvaluator, probes: int, seed: int) -> NDArray[np.float64]:
    """Mean Hessian trace of each slot times its squared error / 2, [slots, candidates] (HAWQ-V2, eq. 11).

    Hutchinson's estimate with `probes` Rademacher vectors for each group of samples.
    """
    generator = torch.Generator().manual_seed(seed)

    def traces(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        gradients = [0 * t if g is None else g for g, t in zip(found, tensors, strict=True)]
        totals = [torch.zeros((), device=loss.device) for _ in tensors]
        for probe in range(probes):
            signs = [torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in tensors]
            products = torch.autograd.grad(
                gradients, tensors, signs, retain_graph=probe + 1 < probes, allow_unused=True
            )
            for k, (sign, product) in enumerate(zip(signs, products, strict=True)):
                if product is not None:
                    totals[k] = totals[k] + (sign * product).sum() / probes
        # The mean curvature, the same for every element.
        return [(total.clamp(min=0) / t.numel()).expand(t.shape) for total, t in zip(totals, tensors, strict=True)]

    scores = np.zeros(engine.space.mask.shape)
    samples = sum(batch.size for batch in engine.batches)
    for size, kinds in _passes(engine, traces, engine.loss_fn):
        for slot, score in _contract(engine, kinds):
            scores[slot] += 0.5 * score * size / samples
    return scores


def derivatives(engine: TorchEvaluator, mixtures: Mixtures) -> NDArray[np.float64]:
    """Of the value, by the shares of mixtures [n, slots, candidates], straight-through; on up to FEW samples.

    0 where the loss has no gradient, as an accuracy, or no finite one, as sqrt(0), or no backward pass can be made.
    """
    net = Supernet(engine)
    for tensor in (*net.model.parameters(), *net.steps):
        tensor.requires_grad_(False)
    for name in engine.norms:  # batch statistics
        net.model.get_submodule(name).train()
    stride, first, parts = -(-sum(batch.size for batch in engine.batches) // FEW), 0, []
    for batch in engine.run_batches:  # every stride-th sample of all
        chosen = torch.arange(-first % stride, batch.size, stride)
        parts += [batch.take(chosen)] if len(chosen) else []
        first += batch.size
    shares = [losses.weight(engine.loss_fn, part.targets, part.size) for part in parts]
    found = np.zeros(mixtures.shape)
    for k, mixture in enumerate(mixtures):
        for part, share in zip(parts, shares, strict=True):
            leaf = torch.tensor(mixture, dtype=torch.float32, device=engine.device, requires_grad=True)
            try:
                with torch.enable_grad():
                    loss = engine.loss_fn(net(part.inputs, leaf), part.targets)
                    (slope,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, ValueError, TypeError):  # such as a numpy() on the way
                return np.zeros(mixtures.shape)
            if slope is not None and share:
                found[k] -= slope.cpu().double().numpy() * share / sum(shares)
    return np.where(np.isfinite(found), found, 0.0)


def _label_loss(engine: TorchEvaluator, output: Any, target: Any, generator: torch.Generator) -> Tensor:
    if engine.loss_fn is not losses.kl:
        return engine.loss_fn(output, target)
    shares = torch.softmax(output.detach().float(), -1).flatten(0, -2)
    labels = torch.multinomial(shares.cpu(), 1, generator=generator).squeeze(1).to(output.device)
    return torch.nn.functional.cross_entropy(output.flatten(0, -2), labels)


def _passes(
    engine: TorchEvaluator, differentiate: Differentiate, loss_of: Callable[[Any, Any], Tensor]
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """For each group of samples: its size, and (value, derivative) of every searched slot."""
    model = duplicate(engine.model, share=False)
    layers = {name: model.get_submodule(name) for name in engine.layers}
    wanted = {slot.name for slot in engine.space.slots}
    entered: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if name in entered:  # a shared module: its first call stands for the others
                return args
            x = x if x.requires_grad else x.detach().requires_grad_()
            entered[name] = x
            return (x, *args[1:])

        return hook

    for name, layer in layers.items():
        if f"{name}.activation" in wanted:
            layer.register_forward_pre_hook(remember(name))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = {f"{name}.weight": layer.weight for name, layer in layers.items() if f"{name}.weight" in wanted}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in engine.batches:
        for start in range(0, batch.size, STEP):
            part = batch.take(torch.arange(start, min(start + STEP, batch.size)))
            entered.clear()
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
                loss = loss_of(call(model, part.inputs), part.targets)
                tensors = weights | {f"{name}.activation": x for name, x in entered.items()}
                found = differentiate(loss, list(tensors.values()))
            yield (
                part.size,
                {n: (t.detach(), d.detach()) for (n, t), d in zip(tensors.items(), found, strict=True)},
            )


def _contract(
    engine: TorchEvaluator, kinds: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """sum(derivative * error^2) of every slot, [candidates]."""
    for index, slot in enumerate(engine.space.slots):
        if slot.name not in kinds:
            continue
        value, derivative = kinds[slot.name]
        score = np.zeros(engine.space.width_count)
        for candidate, grid in enumerate(engine.grids[slot.name]):
            error = on_grid(value, grid) - value
            score[candidate] = float((derivative.double() * error.double().square()).sum())
        yield index, score


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """x fake-quantized on one grid."""
    scale, zero_point = (torch.from_numpy(a).to(x.device) for a in (grid.scale, grid.zero_point))
    integer = bool((zero_point == zero_point.round()).all())
    return ops.fake_quantize(
        x,
        scale,
        zero_point.to(torch.int32) if integer else zero_point,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        axis=grid.axis,
    )
