"""The model as a graph of torch.export, in steps that say whose rows their values have."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves

from smpq_ext.engine.layers import Layer
from smpq_ext.engine.samples import Batch

aten = torch.ops.aten
PRODUCTS = {
    *(getattr(aten, name).default for name in ("linear", "conv1d", "conv2d", "conv3d")),
    *(getattr(aten, name).padding for name in ("conv1d", "conv2d", "conv3d")),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
}
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
ATTENTION = aten.scaled_dot_product_attention.default
FORWARDS = {
    kind.forward
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
# What has samples though nothing before it has, and is the same for all of them.
EQUAL_SAMPLES = {aten.expand.default, aten.repeat.default, aten.full.default, aten.zeros.default, aten.ones.default}
# What takes only dtype and device of its operand.
NEW = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
ROOT = 0  # the place of what depends on no slot: one row


class Uncapturable(Exception):
    """Why the model runs by its own Python instead; whether `mixes`: a sample's values depend on the others."""

    def __init__(self, why: str, mixes: bool = False) -> None:
        super().__init__(why)
        self.mixes = mixes


@dataclass(frozen=True)
class Value:
    """Where a step finds an operand."""

    step: int


@dataclass(frozen=True)
class Samples:
    """A size that is `factor` times the number of samples of all rows."""

    factor: int


@dataclass(frozen=True)
class Step:
    """One operation. Its value has the rows of `place`, or, where that is None, is the same for all samples."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None
    operands: tuple[int, ...]  # the steps that it reads
    layer: int | None = None  # a quantized layer, by its index: one operand
    norm: str | None = None  # a BatchNorm, by its name: its first operand is what it normalizes


@dataclass(frozen=True)
class Graph:
    """Steps in the order in which they run; the first ones are the model's inputs.

    `places` is what the planner takes: place p reads the rows of the places inputs[p] and the choices of the slots
    columns[p].
    """

    steps: tuple[Step, ...]
    inputs: int
    constants: Mapping[int, Any]
    places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    columns: tuple[str, ...]
    outputs: tuple[Any, ...]
    output_spec: TreeSpec
    kinds: tuple[Any, ...]  # shape, the number of samples being a symbol, and dtype of the values that are tensors

    @property
    def returned(self) -> set[int]:
        """The steps whose values the model returns."""
        return {x.step for x in self.outputs if isinstance(x, Value)}

    def frees(self, reads: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
        """What nothing reads any more after each step, where the steps that run, in this order, read `reads`."""
        last = {k: i for i, operands in reads.items() for k in operands}
        returned = self.returned
        found: dict[int, list[int]] = {}
        for k, i in last.items():
            if k not in returned and self.steps[k].place is not None:
                found.setdefault(i, []).append(k)
        return {i: tuple(steps) for i, steps in found.items()}


def capture(model: nn.Module, layers: Sequence[Layer], quantized: Mapping[str, Any], batches: Sequence[Batch]) -> Graph:
    """The graph of a model in eval mode, for these batches, at any number of samples.

    quantized: the names of the slots that have grids. Raises Uncapturable, with the reason.
    """
    if any(batch.signature() != batches[0].signature() for batch in batches):
        raise Uncapturable("the batches differ in more than the number of samples")
    program, symbol = _export(model, batches[0])
    return _Builder(model, layers, quantized, program, symbol).graph()


def leaves(inputs: Any) -> list[Any]:
    """The inputs of a call, in the order in which the graph takes them."""
    if isinstance(inputs, Mapping):
        return tree_leaves(((), dict(inputs)))
    return tree_leaves((tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}))


def _export(model: nn.Module, batch: Batch) -> tuple[torch.export.ExportedProgram, Any]:
    """The functional graph of the model, and the symbol of the number of samples."""
    if batch.size == 1:
        batch = batch.take(torch.zeros(2, dtype=torch.int64))
    inputs = batch.rows(1, 0, min(batch.size, 4) if batch.size != 3 else 2)
    size = next(x.shape[0] for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim())
    samples = torch.export.Dim("samples", min=2)
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}

    shapes = torch.export.ShapesCollection()
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == size:
            shapes[x] = {0: samples}
    try:
        with warnings.catch_warnings(), _no_logging():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            program = program.run_decompositions({})
    except Exception as error:
        why = f"{_line(error, model)}torch.export: {str(error).strip().splitlines()[0]}"
        if "Constraints violated" in why:
            why = (
                "its forward makes a constant of the number of samples; x.shape[0] in place of len(x) keeps it variable"
            )
        raise Uncapturable(why) from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise Uncapturable("its forward changes buffers or inputs")
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in signature.user_inputs:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt):
                return program, value.shape[0].node.expr
    raise Uncapturable("its number of samples is fixed")


def _line(error: BaseException, model: nn.Module) -> str:
    """The last line of the user's own forward that the error, or what it comes from, went through; "" where none."""
    modules = {type(m).__module__ for m in model.modules()}
    own = {getattr(sys.modules.get(name), "__file__", None) for name in modules if not name.startswith("torch.")}
    cause: BaseException | None = error
    while cause is not None:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.filename in own]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}: "
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def _no_logging() -> Iterator[None]:
    """torch.export logs whole graphs where it gives up, and what it says is in its exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class _Builder:
    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        quantized: Mapping[str, Any],
        program: torch.export.ExportedProgram,
        symbol: Any,
    ) -> None:
        self.model, self.program, self.symbol = model, program, symbol
        self.layers = {layer.module: k for k, layer in enumerate(layers)}
        self.names = {module: name for name, module in model.named_modules()}
        self.quantized = {
            k: [slot for kind in ("activation", "weight") if (slot := f"{layer.name}.{kind}") in quantized]
            for k, layer in enumerate(layers)
        }
        self.steps: list[Step] = []
        self.index: dict[fx.Node, int] = {}
        self.constants: dict[int, Any] = {}
        self.columns: list[str] = []
        self.places: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
        self.ancestors: list[frozenset[int]] = [frozenset()]  # of each place
        self.joins: dict[tuple[int, ...], int] = {}
        self.expected: dict[int, Any] = {}  # the fake value of a step

    def graph(self) -> Graph:
        nodes = list(self.program.graph.nodes)
        signature = self.program.graph_signature
        given = set(signature.user_inputs)
        inputs = [n for n in nodes if n.op == "placeholder" and n.name in given]
        for node in inputs:
            self._add(node, Step(_given, (), {}, ROOT if self._has_samples(node) else None, ()))
        tensors = {**self.program.state_dict, **self.program.constants}
        origin = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in nodes:
            if node.op == "placeholder" and node.name not in given:
                if node.name not in origin:
                    raise Uncapturable(f"an input of the kind of {node.name} is not supported")
                self._add(node, Step(_given, (), {}, None, ()))
                self.constants[self.index[node]] = tensors[origin[node.name]].detach()
            elif node.op == "call_function":
                self._call(node)
            elif node.op not in ("placeholder", "output"):
                raise Uncapturable(f"a {node.op} is not supported")
        missing = [layer for layer, k in self.layers.items() if all(step.layer != k for step in self.steps)]
        if missing:
            raise Uncapturable(f"the product of {self.names[missing[0]]} is not found in the graph")
        (output,) = nodes[-1].args
        if any(isinstance(x, fx.Node) and x not in self.index for x in output):
            raise Uncapturable("it returns a size")
        outputs = tuple(Value(self.index[x]) if isinstance(x, fx.Node) else x for x in output)
        return Graph(
            tuple(self.steps),
            len(inputs),
            self.constants,
            tuple(self.places),
            tuple(self.columns),
            outputs,
            self.program.call_spec.out_spec,
            tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else None for x in self.expected.values()),
        )

    def _call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not node.users or isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # asserts, and sizes: those that are used are known from their expressions
        if node.target is operator.getitem and node.args[0].target is BATCH_NORM:
            if node.args[1] != 0:
                raise Uncapturable("the statistics of a BatchNorm are used")
            self.index[node] = self.index[node.args[0]]
            return
        if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
            raise Uncapturable(f"{node.target} is not supported")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _without_dropout(node):
            raise Uncapturable(f"{node.target} draws random numbers")
        target = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}.get(
            node.target, node.target
        )
        operands: list[int] = []
        given = node.args
        if target in NEW and not self._has_samples(node):
            like = torch.empty(0, dtype=given[0].meta["val"].dtype, device=given[0].meta["val"].device)
            target, given = functools.partial(target, like), given[1:]
        args, kwargs = (self._arguments(x, operands) for x in (given, dict(node.kwargs)))
        if not self._has_samples(node):
            if any(self.steps[k].place is not None for k in operands):
                raise Uncapturable(f"{node.name} mixes the samples", mixes=True)
            if not self.constants.keys() >= set(operands):
                raise Uncapturable(f"{node.name} depends on an input without samples")
            self._add(node, Step(target, args, kwargs, None, tuple(operands)))
            with torch.no_grad():
                constant = target(*fill(args, self.constants, 1), **fill(kwargs, self.constants, 1))
            self.constants[self.index[node]] = constant
            return
        places = sorted({place for k in operands if (place := self.steps[k].place) is not None})
        if not places and node.target not in EQUAL_SAMPLES:
            raise Uncapturable(f"{node.name} tells the samples apart by their number")
        place = self._join(places, operands, node.name) if places else ROOT
        module = self._module(node)
        layer = self.layers.get(module) if module is not None and node.target in PRODUCTS else None
        norm = None
        if layer is not None:
            weight = args[1]
            own = module._parameters["weight"]  # type: ignore[union-attr]
            same = isinstance(weight, Value) and self.constants.get(weight.step) is not None
            if not same or own is None or self.constants[weight.step].data_ptr() != own.data_ptr():
                raise Uncapturable(f"{self.names[module]} does not multiply by its own weight")
            if not _is_own_forward(module, node):
                raise Uncapturable(f"the forward of {self.names[module]} does more than multiply by its weight")
            operands, args, kwargs = [args[0].step], (args[0],), {}
            place = self._slots(place, self.quantized[layer])
        elif node.target is BATCH_NORM:
            norm = self.names.get(module) if module is not None else None
            target = _batch_norm
        self._add(node, Step(target, args, kwargs, place, tuple(operands), layer, norm))

    def _add(self, node: fx.Node, step: Step) -> None:
        self.index[node] = len(self.steps)
        value = node.meta.get("val")
        self.expected[len(self.steps)] = value[0] if node.target is BATCH_NORM else value
        self.steps.append(step)

    def _module(self, node: fx.Node) -> nn.Module | None:
        """The innermost module whose forward ran the node."""
        stack = node.meta.get("nn_module_stack")
        return self.model.get_submodule(list(stack.values())[-1][0].split("@")[0]) if stack else None

    def _place(self, inputs: tuple[int, ...], columns: tuple[int, ...]) -> int:
        self.places.append((inputs, columns))
        self.ancestors.append(frozenset(inputs).union(*(self.ancestors[p] for p in inputs)))
        return len(self.places) - 1

    def _slots(self, place: int, slots: list[str]) -> int:
        """The place after these slots: the choices in each part the rows once more."""
        for slot in slots:
            if slot not in self.columns:
                self.columns.append(slot)
            place = self._place((place,), (self.columns.index(slot),))
        return place

    def _join(self, places: list[int], operands: list[int], name: str) -> int:
        """The place whose rows descend from rows of all these; what is gathered must have the samples first."""
        if len(places) == 1:
            return places[0]
        last = next((p for p in places if self.ancestors[p].issuperset(set(places) - {p})), None)
        for k in operands:
            if self.steps[k].place not in (None, last):
                for x in tree_leaves(self.expected[k]):
                    if isinstance(x, Tensor) and not (x.dim() and isinstance(x.shape[0], torch.SymInt)):
                        raise Uncapturable(f"{name} joins values whose first dimension is not that of the samples")
        if last is not None:
            return last
        key = tuple(places)
        if key not in self.joins:
            self.joins[key] = self._place(key, ())
        return self.joins[key]

    def _has_samples(self, node: fx.Node) -> bool:
        return any(
            isinstance(size, torch.SymInt)
            for x in tree_leaves(node.meta.get("val"))
            if isinstance(x, Tensor)
            for size in x.shape
        )

    def _arguments(self, given: Any, operands: list[int]) -> Any:
        """The arguments of a node with Value and Samples in place of nodes; the steps that it reads are added."""

        def one(x: Any) -> Any:
            if not isinstance(x, fx.Node):
                return x
            value = x.meta.get("val")
            if isinstance(value, torch.SymInt):
                factor = value.node.expr / self.symbol
                if not factor.is_Integer:
                    raise Uncapturable(f"a size depends on the number of samples as {value}")
                return Samples(int(factor))
            if isinstance(value, int | float | bool):
                return value
            if x not in self.index:
                raise Uncapturable(f"{x.name} is not supported")
            if self.index[x] not in operands:
                operands.append(self.index[x])
            return Value(self.index[x])

        return fx.map_arg(given, one)


def _without_dropout(node: fx.Node) -> bool:
    """Whether an operation draws numbers for its dropout alone, and has none."""
    if node.target is ATTENTION:
        return (*node.args[4:], 0.0)[0] == 0 and "dropout_p" not in node.kwargs
    return node.target in RECURRENT and node.args[6] is False  # not in training


def _is_own_forward(module: Any, node: fx.Node) -> bool:
    """Whether a call of the layer's module, with its input alone, is the product in the graph."""
    if "forward" in vars(module) or type(module).forward not in FORWARDS:
        return False
    if isinstance(module, nn.Linear):
        return True
    if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
        return False
    # output_size= of a call becomes another output_padding.
    return not module.transposed or tuple((*node.args, *[[0]] * 6)[5]) in (module.output_padding, (0,))


def fill(given: Any, values: Mapping[int, Any], samples: int) -> Any:
    """Arguments with the values of the steps, and sizes for this number of samples."""
    if isinstance(given, Value):
        return values[given.step]
    if isinstance(given, Samples):
        return given.factor * samples
    if isinstance(given, tuple | list):
        return type(given)(fill(x, values, samples) for x in given)
    if isinstance(given, dict):
        return {key: fill(x, values, samples) for key, x in given.items()}
    return given


def _batch_norm(x: Tensor, *arguments: Any) -> Tensor:
    return BATCH_NORM(x, *arguments)[0]


def _given() -> None:
    """The target of what is there before the first step runs."""
