"""The loss that a value is minus of: cross-entropy, KL to the float model, or the user's own."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smpq_ext.core import SmpqError
from smpq_ext.engine.samples import Batch, digest

Loss = Callable[[Any, Any], Tensor]
PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), tuple, list, dict),
    *(np.generic, np.ndarray, Tensor, SimpleNamespace),
)
OWN = "or give loss=, a function of (outputs, targets) that returns a scalar tensor"


IGNORED = -100  # the target that torch's cross-entropy leaves out


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Mean cross-entropy of outputs [..., classes] for integer targets [...], those of -100 left out.

    Raises SmpqError for other shapes, or where it cannot be told which dimension counts the classes.
    """
    return cross_entropies(outputs, targets).sum() / (targets != IGNORED).sum().clamp(min=1)


def cross_entropies(outputs: Any, targets: Tensor) -> Tensor:
    """The same for every target, [...]; 0 for those left out."""
    if not isinstance(outputs, Tensor) or outputs.shape[:-1] != targets.shape:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if isinstance(outputs, Tensor) and (*outputs.shape[:1], *outputs.shape[2:]) == targets.shape:
            raise SmpqError(
                f"loss: cross-entropy wants outputs [..., classes]; those of the model, {shape} for targets "
                f"{tuple(targets.shape)}, seem to have the classes second; give loss=torch.nn.functional.cross_entropy"
            )
        if isinstance(outputs, Tensor) and outputs.shape == targets.shape:
            raise SmpqError(
                f"loss: cross-entropy wants integer targets [...] for outputs [..., classes], and targets {shape} look "
                "one-hot; give targets.argmax(-1), " + OWN
            )
        raise SmpqError(
            f"loss: cross-entropy wants outputs [..., classes] for targets {tuple(targets.shape)}, "
            f"the model gives {shape}; change the model's output, {OWN}"
        )
    if outputs.dim() > 2 and (outputs.shape[0], *outputs.shape[2:]) == targets.shape:
        raise SmpqError(
            f"loss: for outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} classes may be the last or "
            "the second dimension; give loss=torch.nn.functional.cross_entropy if they are the second, " + OWN
        )
    try:
        found = F.cross_entropy(
            outputs.reshape(-1, outputs.shape[-1]).float(),
            targets.reshape(-1).long(),
            reduction="none",
            ignore_index=IGNORED,
        )
        return found.view(targets.shape)
    except IndexError as error:
        raise SmpqError(f"loss: cross-entropy over {outputs.shape[-1]} classes: {error}") from error


def kl(outputs: Any, reference: Tensor) -> Tensor:
    """Mean KL divergence from the float model's log-probabilities, both [..., classes]."""
    return divergences(outputs, reference).mean()


def divergences(outputs: Any, reference: Tensor) -> Tensor:
    """The same for every label, [...]."""
    return F.kl_div(log_probabilities(outputs), reference, reduction="none", log_target=True).sum(-1)


# Of a loss that is a mean over labels: what each label counts, outputs [..., classes] and targets to [...].
EACH: dict[Any, Callable[[Any, Any], Tensor]] = {cross_entropy: cross_entropies, kl: divergences}


def each_label(loss: Loss) -> Callable[[Any, Any], Tensor] | None:
    """What every label counts, where the loss is a mean over labels; None for a user's own, which need not hash."""
    return EACH.get(loss) if inspect.isfunction(loss) else None


def noise_to_signal(outputs: Any, reference: Any) -> Tensor:
    """Squared difference of two tensors over the square of the second: 1 / SQNR. Raises SmpqError for other outputs."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise SmpqError(f"loss: noise to signal wants the model to give one tensor, not a {type(outputs).__name__}")
    return (outputs - reference).double().square().sum() / reference.double().square().sum().clamp(min=1e-30)


def weight(loss: Loss, targets: Any, samples: int) -> float:
    """What the mean over a part counts for in the mean over all: its labels for cross-entropy, else its samples."""
    return float((targets != IGNORED).sum()) if loss is cross_entropy else float(samples)


def log_probabilities(outputs: Any) -> Tensor:
    """Of outputs [..., classes]. Raises SmpqError where the last dimension cannot be that of the classes."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise SmpqError(f"loss: 'kl' wants one tensor [..., classes] of outputs, not {type(outputs).__name__}; {OWN}")
    if outputs.dim() == 0 or outputs.dim() > 3 or outputs.shape[-1] < 2:
        raise SmpqError(
            f"loss: 'kl' wants outputs [samples, classes] or [samples, tokens, classes], the model gives "
            f"{tuple(outputs.shape)}; for an image of classes, or a regression, give loss="
            "a function of (outputs, targets) that returns a scalar tensor"
        )
    return F.log_softmax(outputs.float(), dim=-1)


def choose(loss: Loss | str | None, batches: tuple[Batch, ...]) -> Loss:
    """The loss function. Raises SmpqError where it is not known, or where the targets need one to be given."""
    if loss == "kl":
        return kl
    if callable(loss):
        return loss
    if loss is not None:
        raise SmpqError(f"loss: {loss!r} is not known; give 'kl', None for cross-entropy, {OWN}")
    for batch in batches:
        t = batch.targets
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            kind = f"{t.dtype} tensor" if isinstance(t, Tensor) else type(t).__name__
            raise SmpqError(
                f"loss: the targets are of type {kind}, and cross-entropy needs integers; give "
                "loss=torch.nn.functional.mse_loss for a regression, loss='kl' for a classifier, " + OWN
            )
    return cross_entropy


def identity(loss: Any, above: tuple[Any, ...] = ()) -> str:
    """What tells this loss from another: its name, source (or bytecode), and the plain values it was bound to.

    above: functions and modules whose identity is being told; where one uses another in a circle, its name does.
    """
    if isinstance(loss, functools.partial):
        return f"partial({identity(loss.func, above)}, {_plain(loss.args, above)}, {_plain(loss.keywords, above)})"
    if isinstance(loss, nn.Module):
        name = f"{type(loss).__module__}.{type(loss).__qualname__}"
        if any(loss is a for a in above):
            return name
        return f"{name} {digest([loss.state_dict()])}\n{code_of(loss, above)}"
    if inspect.ismethod(loss):
        return f"{identity(loss.__func__, above)} of {_plain(getattr(loss.__self__, '__dict__', None), above)}"
    if not inspect.isroutine(loss):
        name = f"{type(loss).__module__}.{type(loss).__qualname__}"
        return f"{name} {source(type(loss))} {_plain(getattr(loss, '__dict__', None), above)}"
    name = f"{loss.__module__}.{loss.__qualname__}"
    if not inspect.isfunction(loss) or loss.__module__.partition(".")[0] == "torch" or any(loss is a for a in above):
        return name
    code, above = loss.__code__, (*above, loss)
    cells = [cell.cell_contents for cell in loss.__closure__ or ()]
    used = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    names = {n: loss.__globals__[n] for n in used if n in loss.__globals__}
    values = (cells, loss.__defaults__, loss.__kwdefaults__, names)
    bound = "".join(_plain(value, above) for value in values)
    return f"{name}\n{source(loss)}\n{code.co_code.hex()} {_plain(code.co_consts)} {code.co_names}\n{bound}"


def source(code: Any) -> str:
    """The source of a class or function, or its name where there is none."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return f"{code.__module__}.{code.__qualname__}"


def code_of(module: nn.Module, above: tuple[Any, ...] = ()) -> str:
    """What the modules inside, but for torch's, do: classes, the values they were given, and what forward uses."""
    told, above = [], (*above, *module.modules())
    for name, m in module.named_modules():
        told.append(f"{name} {type(m).__qualname__} {m.extra_repr()} {settings(m, above)}")
        if not _is_torchs(type(m)):
            told += [source(c) for c in type(m).__mro__ if not _is_torchs(c)]
            told.append(identity(type(m).forward, above))
    return "\n".join(dict.fromkeys(told))


def settings(module: nn.Module, above: tuple[Any, ...] = ()) -> str:
    """The plain values that a module was given as attributes, such as a factor in its forward."""
    return _plain({k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, PLAIN)}, above)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("torch", "builtins")


def _plain(value: Any, above: tuple[Any, ...] = ()) -> str:
    """repr, without the address of an object, which would change from run to run."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(k, above)}: {_plain(v, above)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(_plain(v, above) for v in value) + ")"
    if isinstance(value, SimpleNamespace):
        return _plain(vars(value), above)
    if isinstance(value, Tensor | np.ndarray):
        return digest([value if isinstance(value, Tensor) else (str(value.dtype), value.tolist())])
    if isinstance(value, np.generic):
        return f"{value.dtype} {value.item()!r}"
    if isinstance(value, nn.Module) or inspect.isroutine(value):
        return identity(value, above)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"
