"""The engine on random graphs: branches, joins, concatenation, shared modules, in-place steps, views, two inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from python_tests.plain_loop import oracle, random_assignments, random_mixtures
from python_tests.random_models import CLASSES

pytestmark = pytest.mark.usefixtures("compiled")
FUNCTIONS = {
    "relu": F.relu,
    "in place": lambda x: x.relu_(),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "view": lambda x: x.flatten(1).view(x.shape),
    "transpose": lambda x: x.permute(0, 2, 3, 1).mul(2.0).permute(0, 3, 1, 2),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
}
Step = tuple[str, tuple[int, ...]]  # a function, or a module by its name, and the values that it reads


class Steps(nn.Module):
    """Runs steps in order; what nothing reads is averaged and goes to a linear head."""

    def __init__(
        self, modules: dict[str, nn.Module], steps: list[Step], inputs: int, last: list[int], width: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(modules)
        self.steps, self.inputs, self.last = steps, inputs, last
        self.head = nn.Linear(width, CLASSES)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        for name, read in self.steps:
            operands = [values[k] for k in read]
            if name == "add":
                values.append(operands[0] + operands[1])
            elif name == "cat":
                values.append(torch.cat(operands, 1))
            else:
                values.append((self.layers[name] if name in self.layers else FUNCTIONS[name])(*operands))
        return self.head(torch.cat([values[k].mean((2, 3)) for k in self.last], 1))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Steps, list[tuple[Any, Tensor]]]:
    """A model in eval mode with lived-in BatchNorms, and two batches."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    inputs = draw(st.integers(1, 2))
    shapes: list[tuple[int, ...]] = [(3, 8, 8)] * inputs  # of every value
    modules: dict[str, nn.Module] = {}
    takes: dict[str, int] = {}  # channels of every layer's input
    steps: list[Step] = []
    for k in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "norm", "shared", "add", "cat", *FUNCTIONS]))
        x = draw(st.integers(0, len(shapes) - 1))
        channels, *size = shapes[x]
        alike = [y for y, shape in enumerate(shapes) if shape[1:] == (*size,) and (kind == "cat" or shape == shapes[x])]
        shared = [name for name, count in takes.items() if count == channels]
        if kind == "shared" and shared:
            kind, read = draw(st.sampled_from(shared)), (x,)
        elif kind in ("add", "cat"):
            read = (x, draw(st.sampled_from(alike)))
        elif kind in ("conv", "shared"):
            groups = draw(st.sampled_from([1, 1, channels]))
            outs = channels if groups > 1 else draw(st.sampled_from([4, 6, 17]))
            kernel, stride = draw(st.sampled_from([(1, 1), (3, 1), (3, 2)]))
            module = nn.Conv2d(channels, outs, kernel, stride, kernel // 2, groups=groups, bias=draw(st.booleans()))
            kind, read, takes[f"conv{k}"] = f"conv{k}", (x,), channels
            modules[kind] = module
        elif kind == "norm":
            kind, read, modules[f"norm{k}"] = f"norm{k}", (x,), nn.BatchNorm2d(channels)
        else:
            read = (x,)
            if kind == "in place" and x < inputs:
                kind = "relu"  # the inputs are the user's
        steps.append((kind, read))
        operands = [torch.zeros(2, *shapes[j]) for j in read]
        if kind in ("add", "cat"):
            value = operands[0] + operands[1] if kind == "add" else torch.cat(operands, 1)
        else:
            value = (modules[kind] if kind in modules else FUNCTIONS[kind])(*operands)
        shapes.append(tuple(value.shape[1:]))
    read_by_some = {k for _, read in steps for k in read}
    last = [k for k in range(len(shapes)) if k not in read_by_some]
    model = Steps(modules, steps, inputs, last, sum(shapes[k][0] for k in last))
    data: list[tuple[Any, Tensor]] = []
    for samples in (24, 16):
        planes = tuple(torch.randn(samples, 3, 8, 8) for _ in range(inputs))
        data.append((planes if inputs > 1 else planes[0], torch.randint(0, CLASSES, (samples,))))
    model.train()
    with torch.no_grad():
        for planes, _ in data:
            model(*(planes if inputs > 1 else (planes,)))
    return model.eval(), data


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
@given(graphs(), st.booleans(), st.sampled_from([(2, 8), (2, 8), (3, 10)]), st.integers(0, 10**6))
def test_values_are_those_of_a_plain_loop(case: Any, renormalize: bool, widths: tuple[int, ...], seed: int) -> None:
    model, data = case
    ev = smpq_ext.evaluator(model, data, bits=(3, 8), activation_bits=widths, renormalize=renormalize, fixed={})
    assert ev._executor.lockstep is not None, ev.notes
    rows = np.concatenate([ev.space.one_hot(random_assignments(ev, 5, seed)), random_mixtures(ev, 4, seed)])
    expected = np.array([oracle(ev, row) for row in rows])
    # A rounding difference that lands on a tie moves one code by a whole step; a wrong row is off by the spread.
    np.testing.assert_allclose(ev(rows), expected, rtol=1e-3, atol=2e-3 * float(np.ptp(expected)))
