"""What changes a study: fingerprints of models, data, losses and settings."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from python_tests.random_models import CLASSES, build

BITS = (2, 3, 8)


def weighted(weights: np.ndarray) -> Any:
    return lambda out, y: F.cross_entropy(out, y, weight=torch.as_tensor(weights, dtype=torch.float32))


def scaled(out: Tensor, y: Tensor, by: SimpleNamespace) -> Tensor:
    return float(by.a) * F.cross_entropy(out, y)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(out, y)


STRETCH = 1.0
THE_MODEL: list[nn.Module] = []  # that its own forward looks at


class Stretched(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return (STRETCH if THE_MODEL is not None else 0.0) * super().forward(x)


def test_what_a_forward_reads_from_its_module_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, data) = Stretched(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)), build("Shared", 0)
    monkeypatch.setitem(Stretched.forward.__globals__, "THE_MODEL", [model])
    first = smpq_ext.evaluator(model, data, bits=BITS, fixed={})
    monkeypatch.setitem(Stretched.forward.__globals__, "STRETCH", 1.5)
    assert smpq_ext.evaluator(model, data, bits=BITS, fixed={}).fingerprint != first.fingerprint


def test_fingerprints_and_the_parts_that_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("Branches", 0)
    make = partial(smpq_ext.evaluator, bits=BITS)
    first = make(model, data)
    assert make(copy.deepcopy(model), [(x.clone(), y) for x, y in data]).fingerprint == first.fingerprint
    assert len(first.fingerprint) == 64

    def changed(change: Any) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        return other

    others = [
        ("weights", make(changed(lambda m: m.point.weight[0, 0, 0, 0].add_(1e-6)), data)),
        ("weights", make(changed(lambda m: m.head.bias[0].add_(1e-6)), data)),
        ("weights", make(changed(lambda m: m.norm.running_mean[0].add_(1)), data)),
        ("weights", make(changed(lambda m: m.norm.running_var[0].mul_(2)), data)),
        ("model", make(changed(lambda m: setattr(m.norm, "eps", 1e-3)), data)),
        ("data", make(model, [(x, (y + 1) % CLASSES) for x, y in data])),
        ("data", make(model, [(x, y if k else y.roll(1)) for k, (x, y) in enumerate(data)])),
        ("data", make(model, [(x.roll(1, -1), y) for x, y in data])),
        ("data", make(model, data[:-1])),
        ("data", make(model, [(x.flip(0), y.flip(0)) for x, y in data])),
        ("data loss", make(model, data, loss="kl")),
        ("loss", make(model, data, loss=lambda out, y: 1 * F.cross_entropy(out, y))),
        ("loss", make(model, data, loss=lambda out, y: 2 * F.cross_entropy(out, y))),
        ("loss", make(model, data, loss=partial(F.cross_entropy, label_smoothing=0.1))),
        ("loss", make(model, data, loss=partial(F.cross_entropy, label_smoothing=0.2))),
        ("loss", make(model, data, loss=nn.CrossEntropyLoss())),
        ("loss", make(model, data, loss=nn.CrossEntropyLoss(label_smoothing=0.1))),
        *(("loss", make(model, data, loss=weighted(weights))) for weights in (np.ones(CLASSES), np.arange(CLASSES))),
        *(("loss", make(model, data, loss=Scaled(factor))) for factor in (1.0, 2.0)),
        *(("loss", make(model, data, loss=lambda out, y, c=c: c(out, y))) for c in (Scaled(3.0), Scaled(4.0))),
        *(("loss", make(model, data, loss=partial(scaled, by=SimpleNamespace(a=a)))) for a in (1, np.float32(2))),
        ("model", make(changed(lambda m: setattr(m, "table", {"a": np.zeros(2)})), data)),
        ("model", make(changed(lambda m: setattr(m, "table", {"a": np.ones(2)})), data)),
        ("options", make(model, data, renormalize=False)),
        ("options", make(model, data, bits=(2, 3))),
        ("options", make(model, data, activation_bits=(4, 8))),
        ("options", make(model, data, fixed={})),
        ("options", make(model, data, fixed={"point.weight": 8})),
        ("", make(model, data, calibrate="minmax")),
        ("", make(model, data, mixture_bits=16)),
    ]
    monkeypatch.setattr(smpq_ext, "__version__", "0.0.1")
    others.append(("versions", make(model, data)))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    others.append(("versions", make(model, data)))
    assert len({first.fingerprint, *(ev.fingerprint for _, ev in others)}) == 1 + len(others)
    for parts, ev in others:
        differ = {part for part, digest in ev.digests.items() if digest != first.digests[part]}
        consequences = {"grids", "kernels"}  # of what else was changed
        assert differ - consequences == set(parts.split()) and differ


def test_float64_models_work_and_settings_change_the_fingerprint() -> None:
    def build(slope: float) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(slope), nn.Linear(16, 5)).double()

    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(0, 5, (32,))
    found = [smpq_ext.evaluator(build(slope), [(x, y)], bits=(2, 8), fixed={}) for slope in (0.01, 0.02, 0.01)]
    assert found[0].fingerprint == found[2].fingerprint != found[1].fingerprint
    assert np.isfinite(found[0](np.zeros((1, len(found[0].slots)), np.int8))).all()


def even(n: int, x: Tensor) -> Tensor:
    return x if n == 0 else odd(n - 1, x)


def odd(n: int, x: Tensor) -> Tensor:
    return even(n - 1, x)


def test_a_loss_whose_helpers_call_each_other_has_a_fingerprint() -> None:
    model, data = build("Shared", 0)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(even(2, outputs), targets)

    ev = smpq_ext.evaluator(model, data, bits=(2, 8), loss=loss)
    assert ev.fingerprint != smpq_ext.evaluator(model, data, bits=(2, 8)).fingerprint


def test_modules_that_know_their_owner_have_a_fingerprint() -> None:
    model, data = build("Shared", 0)
    model.first.owner, model.last.others = [model], {"one": model.one, "itself": model.last}
    ev = smpq_ext.evaluator(model, data, bits=(2, 8))
    assert len(ev.fingerprint) == 64


def test_a_loss_that_has_no_hash_can_be_given() -> None:
    class Mean:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets)

    model, data = build("Shared", 0)
    own, plain = (smpq_ext.evaluator(model, data, bits=(2, 8), loss=loss) for loss in (Mean(), None))
    assert own.float_loss == pytest.approx(plain.float_loss, rel=1e-6)


def test_two_losses_of_one_name_are_told_apart() -> None:
    x, y = torch.randn(32, 8), torch.randint(0, 5, (32,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    made = [lambda o, t: nn.functional.cross_entropy(o, t) * 3, lambda o, t: nn.functional.cross_entropy(o, t) * 2]
    prints = {smpq_ext.evaluator(model, [(x, y)], bits=(2, 8), fixed={}, loss=loss).fingerprint for loss in made}
    assert len(prints) == 2
