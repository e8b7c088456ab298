"""Finds the layers of a model, in the order they run, and says what is left out and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from smpq_ext.core import SmpqError
from smpq_ext.engine.samples import Batch, run

LEFT_OUT = {
    nn.MultiheadAttention: "its projections are used in a function, not through forward; use separate nn.Linear layers",
    nn.RNNBase: "recurrent layers keep their weights in one function",
    nn.RNNCellBase: "recurrent layers keep their weights in one function",
    nn.Embedding: "an embedding is a table look-up, its weight stays float",
    nn.EmbeddingBag: "an embedding is a table look-up, its weight stays float",
    nn.Bilinear: "nn.Bilinear is not supported",
}
FUNCTIONS: dict[Any, str] = {
    getattr(where, name): name
    for where, names in (
        (F, "linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
        (F, "scaled_dot_product_attention"),
        (torch, "matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d"),
        (Tensor, "matmul __matmul__ __rmatmul__ mm bmm"),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Layer:
    """A module that owns a weight; `axis` counts the weight's output channels."""

    name: str
    module: nn.Module
    axis: int
    elements: int  # of the input, for one sample, over all calls
    macs: int  # for one sample, over all calls
    shares: str | None  # the first layer that owns the same Parameter

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach()  # type: ignore[union-attr, operator]


@contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """No gradients, the random state as it was, and no fused transformer path that goes round the modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)  # a model that draws numbers draws the same ones for every row
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def duplicate(model: nn.Module, share: bool) -> nn.Module:
    """A copy of the model in eval mode; with `share` its Parameters are the model's own, so weights take no memory.

    Raises SmpqError where it cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share else {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # torch refuses to copy these
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise SmpqError(f"model: it cannot be copied by copy.deepcopy ({type(error).__name__}: {error})") from error


def channel_axis(module: nn.Module) -> int | None:
    """The axis of the weight that counts output channels; None where no axis does."""
    if not isinstance(module, _ConvTransposeNd):
        return 0
    depthwise = module.groups == module.in_channels and module.weight.shape[1] == 1
    return 0 if depthwise else 1 if module.groups == 1 else None


def check_weights(model: nn.Module) -> None:
    """Raises SmpqError where a parameter is not there yet, or holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise SmpqError(f"model: {name} is not initialised (a lazy module); run the model once on a batch first")
        if parameter.is_meta:
            raise SmpqError(f"model: {name} is on the meta device and has no values; load the weights first")
        if parameter.is_inference():
            raise SmpqError(f"model: {name} was made under inference_mode, load or build the model outside of it")
        if not torch.isfinite(parameter).all():
            layer = name.rpartition(".")[0]
            raise SmpqError(f"model: the parameter {name} of layer {layer!r} holds NaN or infinity")
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats)
    for name, norm in norms:
        if not all(torch.isfinite(x).all() for x in norm.buffers()) or (norm.running_var < 0).any():
            what = "NaN, infinity or a negative variance"
            raise SmpqError(f"model: the running statistics of layer {name!r} hold {what}")


def find(model: nn.Module, batch: Batch) -> tuple[list[Layer], dict[str, str], dict[str, int]]:
    """One float forward: the layers in execution order, what was left out and why, and how often each BatchNorm ran.

    Raises SmpqError where there is no layer to quantize.
    """
    names = {module: name for name, module in model.named_modules()}
    candidates = {m for m in names if isinstance(m, _ConvNd | nn.Linear)}
    elements: dict[nn.Module, int] = {}
    macs: dict[nn.Module, int] = {}
    norms: dict[str, int] = {}
    left_out: dict[str, str] = {}
    inside: list[nn.Module] = []
    by_keyword: set[nn.Module] = set()
    elsewhere: set[nn.Module] = set()  # layers whose weight is used by another module than its own
    owners = {w.data_ptr(): m for m in candidates if isinstance(w := m._parameters.get("weight"), Tensor)}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        inside.append(module)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.pop()
        if isinstance(module, _BatchNorm):
            norms[names[module]] = norms.get(names[module], 0) + 1
        if module in candidates and not args:
            by_keyword.add(module)
        if module in candidates and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            weight = module.weight
            transposed = isinstance(module, _ConvTransposeNd)
            positions = (args[0] if transposed else output).numel() // weight.shape[0]
            elements[module] = elements.get(module, 0) + args[0].numel() // batch.size
            macs[module] = macs.get(module, 0) + positions * weight.numel() // batch.size

    def function(name: str | None, operands: list[Tensor]) -> None:
        for x in operands:
            module = owners.get(x.data_ptr()) if type(x) in (Tensor, nn.Parameter) and x.numel() else None
            if module is not None and inside and all(p is not module.weight for p in inside[-1]._parameters.values()):
                elsewhere.add(module)
        if name and inside and not any(m in candidates or isinstance(m, tuple(LEFT_OUT)) for m in inside):
            left_out.setdefault(
                names[inside[-1]] or "(the model itself)",
                f"its forward calls {name} directly; only modules that own a weight are quantized",
            )

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with _Functions(function):
            run(model, batch, 0)
    finally:
        for handle in handles:
            handle.remove()

    for module, name in names.items():
        reason = next((why for kind, why in LEFT_OUT.items() if isinstance(module, kind)), None)
        if module in candidates:
            if not isinstance(module._parameters.get("weight"), nn.Parameter):
                reason = "its weight is computed, not a parameter; remove the parametrization or weight norm first"
            elif not module.weight.is_floating_point():
                reason = f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not a floating point number"
            elif module in by_keyword:
                reason = "its forward gets its input by keyword; pass it by position"
            elif module in elsewhere:
                reason = "its weight is also used by another module, which would not see it quantized"
            elif channel_axis(module) is None:
                reason = "no axis of a grouped transposed convolution's weight counts its output channels"
            elif module not in elements:
                reason = "it never ran through forward, with its input as first argument, on the first batch"
        if reason:
            left_out[name or "(the model itself)"] = reason
            elements.pop(module, None)
    layers: list[Layer] = []
    owner: dict[int, str] = {}
    for module, count in elements.items():
        name, weight = names[module], module.weight
        first = owner.setdefault(id(weight), name)
        shares = None if first == name else first
        axis = channel_axis(module)
        assert axis is not None
        layers.append(Layer(name, module, axis, count, macs[module], shares))
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "it has no Conv or Linear module"
        raise SmpqError(f"model: no layer to quantize ({why})")
    return layers, left_out, norms


class _Functions(TorchFunctionMode):
    """Tells of every call of a function that gives a tensor: its name where it is a product, and its operands."""

    def __init__(self, tell: Callable[[str | None, list[Tensor]], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and getattr(func, "__name__", "") != "__get__":
            self.tell(FUNCTIONS.get(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        return result
