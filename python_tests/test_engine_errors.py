"""What the evaluator says of input that it cannot use, and of what it does otherwise than one might expect."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from python_tests.plain_loop import random_assignments
from python_tests.random_models import CLASSES, build
from smpq_ext.core import SmpqError

BITS = (2, 3, 8)


def test_non_finite_numbers_name_their_layer() -> None:
    model, data = build("Branches", 0)
    make = partial(smpq_ext.evaluator, bits=BITS)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.left.weight[0] = torch.nan
    with pytest.raises(SmpqError, match=r"left\.weight"):
        make(broken, data)
    x, y = data[0]
    masked = x.clone()
    masked[3, 1, 2] = torch.nan
    with pytest.raises(SmpqError, match=r"inputs of item 2 hold nan, first in sample 3.*'stem'"):
        make(model, [(x, y), (x, y), (masked, y)])
    broken = copy.deepcopy(model)
    broken.stem.register_forward_pre_hook(lambda m, args: (args[0] * torch.inf,))
    with pytest.raises(SmpqError, match="'stem' holds NaN or infinity; look at the layers before"):
        make(broken, data)
    broken = copy.deepcopy(model)
    broken.norm.running_var[1] = -1
    with pytest.raises(SmpqError, match="running statistics of layer 'norm'"):
        make(broken, data)
    broken = copy.deepcopy(model)
    broken.head.register_forward_hook(lambda m, args, out: out * torch.inf)
    with pytest.raises(SmpqError, match=r"float model is .*leaves head"):
        make(broken, data)

    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (x.std(0) > self.limit)

        limit = 0.0

    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), Fragile(), nn.Linear(6, CLASSES))
    ev = make(net, build("Shared", 0)[1])
    ev._executor.model[3].limit = 1e9
    with pytest.raises(SmpqError, match=r"row 1, 2\.weight at 3 bits.* is nan.*leaves 3.*fixed="):
        ev._complain(np.array([[0.0], [np.nan]]), ev.space.one_hot(random_assignments(ev, 2)), [0, 1])
    many = make(*build("Branches", 0), fixed={})
    said = many._describe(many.space.one_hot(many.space.lowest()[None])[0])
    assert f"and {len(many.slots) - 3} slots below their highest width (bits 2 2 2 " in said


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": ()}, "bits: widths"),
        ({"bits": (0, 4)}, "bits: widths"),
        ({"bits": (2.5,)}, "bits: widths"),
        ({"bits": 4}, "bits: widths"),
        ({"bits": (True, 8)}, "bits: widths"),
        ({"fixed": {"last": True}}, "last: a width from 1 to 16"),
        ({"memory": True}, "memory: a number of bytes"),
        ({"data": [(np.zeros((3, 6), np.float32), 0)]}, r"item 0 holds NumPy arrays; torch\.from_numpy"),
        ({"data": [(torch.zeros(3, 6), 0), (torch.zeros(0, 6), 0)]}, "item 1 has 0 samples"),
        ({"loss": lambda outputs, targets: outputs.sum() * torch.nan}, "look at loss= and the targets"),
        ({"model": nn.LSTM(6, 5)}, r"\(the model itself\): recurrent"),
        ({"activation_bits": (17,)}, "activation_bits: widths"),
        ({"renormalize": "maybe"}, "renormalize"),
        ({"calibrate": "best"}, "calibrate"),
        ({"data": []}, "it is empty"),
        ({"data": [torch.zeros(3, 6)]}, "not a pair"),
        ({"data": torch.zeros(3, 6)}, "no iterable of batches"),
        ({"data": [(torch.tensor(1.0), 0)]}, "no tensor with a batch dimension"),
        ({"model": nn.ReLU()}, "no Conv or Linear"),
        ({"model": nn.Sequential(nn.LazyLinear(5))}, "not initialised"),
        ({"model": "resnet"}, r"nn\.Module is needed"),
        ({"model": nn.Linear(6, 5, device="meta")}, "meta device"),
        ({"model": torch.inference_mode()(lambda: nn.Linear(6, 5))()}, "inference_mode"),
        ({"data": [(torch.zeros(3, 6), 0), (torch.zeros(3, 7), 0)], "loss": "kl"}, "of item 1 .RuntimeError: mat1"),
        (
            {"data": [(torch.zeros(3, 7), 0)], "loss": "kl"},
            "fails in layer 'first' .Linear. on the inputs of item 0 .RuntimeError: mat1",
        ),
        ({"memory": "1GB"}, "memory: a number of bytes"),
        ({"loss": lambda outputs: outputs.sum()}, "loss: it fails on outputs of the model"),
        ({"fixed": {"last": np.int64(17)}}, "width from 1 to 16"),
    ],
)
def test_errors_say_what_to_do(change: dict[str, Any], match: str) -> None:
    model, data = build("Shared", 0)
    with pytest.raises(SmpqError, match=match):
        smpq_ext.evaluator(**{"model": model, "data": data, "bits": BITS, **change})


def test_rows_that_are_none_name_the_row_and_the_slot() -> None:
    ev = smpq_ext.evaluator(*build("Shared", 0), bits=BITS)
    n = len(ev.slots)
    assert ev(np.empty((0, n), np.int8)).shape == (0,)
    rows = np.zeros((2, n), np.int64)
    rows[1, 2] = 8
    mixtures = ev.space.one_hot(np.zeros((2, n), np.int8)).astype(np.float64)
    mixtures[1, 3, 1] = 1e300
    for given, message in (
        (np.zeros((1, 2), np.int8), rf"assignments: expected \[n, {n}\], got \[1, 2\]"),
        (rows, rf"row 1 has 8 for {ev.slots[2]}; an entry is an index into its candidates \(2, 3, 8\), from 0 to 2"),
        (-rows, "row 1 has -8"),
        (np.zeros(n, np.int8), r"rows: expected assignments.* or mixtures"),
        (np.zeros((1, n), np.bool_), r"rows: expected .* got bool"),
        (np.zeros((1, n), np.float32), r"rows: expected .* got float32"),
        (mixtures, rf"mixtures: row 1 has the weight 1e\+300 for candidate 1 of {ev.slots[3]}"),
        (mixtures * np.nan, "mixtures: row 0 has the weight nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ev(given)


def test_a_row_that_takes_more_than_the_memory_given_is_noted() -> None:
    make = partial(smpq_ext.evaluator, *build("Branches", 0), bits=BITS)
    ev = make(memory=np.int64(1000))
    (note,) = ev.notes
    assert f"one row takes about {ev._row_bytes} bytes, memory= gives 1000" in note and ev._row_bytes > 1000
    assert make(memory=ev._row_bytes).notes == ()


def test_one_buffer_that_a_generator_fills_again_and_again_is_read_each_time() -> None:
    model, data = build("Shared", 0, (8, 8, 8))

    def refilled() -> Any:
        x, y = torch.empty_like(data[0][0]), torch.empty_like(data[0][1])
        for inputs, targets in data:
            yield x.copy_(inputs), y.copy_(targets)

    ev = smpq_ext.evaluator(model, refilled(), bits=BITS)
    assert ev.fingerprint == smpq_ext.evaluator(model, data, bits=BITS).fingerprint


def test_losses_that_do_not_fit_say_what_to_do() -> None:
    model, data = build("Shared", 0)
    make = partial(smpq_ext.evaluator, model, bits=BITS)
    regression = [(x, torch.randn(len(x), CLASSES)) for x, _ in data]
    with pytest.raises(SmpqError, match="mse_loss"):
        make(regression)
    assert make(regression, loss=F.mse_loss).float_loss > 0
    with pytest.raises(SmpqError, match="not known"):
        make(data, loss="hinge")
    with pytest.raises(SmpqError, match="scalar"):
        make(data, loss=partial(F.cross_entropy, reduction="none"))
    with pytest.raises(SmpqError, match="out of bounds"):
        make([(x, y + CLASSES) for x, y in data])


def test_what_cannot_be_cut_or_reached_is_said() -> None:
    class Packed(nn.Linear):
        def forward(self, x: Tensor) -> object:
            return Box(super().forward(x))

    class Box:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Keyword(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](input=x))

    data = [(torch.randn(16, 4), torch.randint(0, 3, (16,)))]
    loss = lambda o, t: nn.functional.cross_entropy(o.logits, t)  # noqa: E731
    with pytest.raises(SmpqError, match="returns a Box"):
        smpq_ext.evaluator(nn.Sequential(nn.Linear(4, 4), Packed(4, 3)), data, bits=(2,), fixed={}, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(SmpqError, match="ScriptModule"):
        smpq_ext.evaluator(scripted, data, bits=(2,), fixed={})
    ev = smpq_ext.evaluator(Keyword(nn.Linear(4, 4), nn.Linear(4, 3)), data, bits=(2, 4), fixed={})
    assert "by keyword" in ev.left_out["0"] and ev.slots == ("1.weight", "1.activation")


def test_capturing_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[1](y if y.mean() > 0.1 else -y)

    model = Branches(nn.Linear(6, 8), nn.Linear(8, 5))
    ev = smpq_ext.evaluator(model, [(torch.randn(8, 6), torch.randint(0, 5, (8,)))], bits=(4, 8), fixed={})
    assert capfd.readouterr().err == ""
    (note,) = ev.notes
    branch = next(k for k, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "y.mean() > 0.1" in line)
    assert f"folded into the batch: {__file__}:{branch}: torch.export: Could not guard" in note


@pytest.mark.parametrize(
    ("targets", "message"),
    [(torch.randint(0, 5, (4, 6, 6)), "classes second; give loss=torch"), (torch.rand(4, 5, 6, 6).long(), "one-hot")],
)
def test_targets_that_do_not_fit_are_told_apart(targets: Tensor, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 5, 1))
    with pytest.raises(SmpqError, match=message):
        smpq_ext.evaluator(model, [(torch.randn(4, 3, 6, 6), targets)], bits=(4, 8))
