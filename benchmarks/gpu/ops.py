"""The ops beside a copy, torch's own (B2), torch.compile (B3), a Triton kernel (B7) and an empty kernel."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Fixed
from benchmarks.gpu.events import Side, medians, replayed
from benchmarks.models import resnet50
from smpq_ext import ops
from smpq_ext.engine.grids import Grids

BITS = (2, 3, 4, 6, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ELEMENTS = (1 << 16, 1 << 22, 1 << 28)
COALITIONS = (1, 8, 64)
CHANNELS = 256
Case = tuple[str, Callable[[], dict[str, Any]]]


def machine(device: torch.device, size: int = 8192, copied: int = 1 << 31) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and products a second of a bfloat16 product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randint(0, 100, (copied,), dtype=torch.uint8, device=device)
    y, out = torch.empty_like(x), torch.empty_like(a)
    found = medians({"copy": lambda k: y.copy_(x), "product": lambda k: torch.mm(a, b, out=out)}, 1, device)
    return {"bytes/s": 2 * copied / found["copy"], "products/s": size**3 / found["product"]}


class Operands:
    """As many tensors [channels, size] as fit no cache; max-abs grids, scale [widths] or [widths, channels]."""

    def __init__(self, elements: int, dtype: torch.dtype, per_channel: bool, device: torch.device) -> None:
        rng = torch.Generator(device).manual_seed(0)
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        shape = (CHANNELS, elements // CHANNELS)
        sets = max(1, 4 * cache // (elements * dtype.itemsize))
        self.x = [torch.randn(shape, generator=rng, device=device, dtype=dtype) for _ in range(sets)]
        self.low, self.high = (
            torch.tensor(codes, dtype=torch.int32, device=device) for codes in zip(*map(ops.bounds, BITS), strict=True)
        )
        largest = self.x[0].abs().amax(1).float() if per_channel else self.x[0].abs().amax().float()
        self.scale = torch.stack([largest / high for high in self.high])
        self.axis = 0 if per_channel else None
        self.torch_op = Fixed(Grids(self.scale, torch.zeros_like(self.scale), self.low, self.high, self.axis)).quantize


def formula() -> Callable[[Tensor, Tensor, int, int], Tensor]:
    """B3. One case compiles it for a few widths: what other cases compiled is forgotten, or it would run uncompiled."""
    torch._dynamo.reset()

    def quantized(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        own = scale.unsqueeze(-1) if scale.dim() else scale
        return (torch.clamp(torch.round(x / own), low, high) * own).to(x.dtype)

    return torch.compile(quantized, dynamic=False)


def fake_quantize(elements: int, dtype: torch.dtype, per_channel: bool, device: torch.device) -> dict[str, Any]:
    o = Operands(elements, dtype, per_channel, device)
    c = BITS.index(4)
    low, high = ops.bounds(4)
    compiled = formula()
    sides: dict[str, Side] = {
        "ours": lambda k: ops.fake_quantize(o.x[k], o.scale[c], quant_min=low, quant_max=high, axis=o.axis),
        "copy": lambda k: o.x[k].clone(),
        "B2": lambda k: o.torch_op(o.x[k], c),
        "B3": lambda k: compiled(o.x[k], o.scale[c], low, high),
    }
    if importlib.util.find_spec("triton") is not None and device.type == "cuda":
        from benchmarks.gpu.triton_kernel import fake_quantize as by_triton

        sides["B7"] = lambda k: by_triton(o.x[k], o.scale[c], low, high)
    for name in {"B2", "B3", "B7"} & set(sides):
        _agree(name, sides["ours"](0), sides[name](0), o.scale[c])
    if device.type == "cuda":
        sides["empty"] = lambda k: torch.cuda._sleep(0)
    row = _row(sides, len(o.x), 2 * o.x[0].nbytes, device)
    if elements == max(ELEMENTS):
        row |= _goal(row, "of copy", 0.9)
    elif elements == min(ELEMENTS):
        row |= _goal(row, "vs empty", 1 / 1.2)
    return row


def coalition(elements: int, n: int, mixed: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """n coalitions of five widths, per channel; B3: five calls for each that mixes, one for each that does not."""
    o = Operands(elements, dtype, True, device)
    mixtures = torch.rand(n, len(BITS), generator=torch.Generator().manual_seed(1))
    mixtures = mixtures / mixtures.sum(1, keepdim=True) if mixed else torch.eye(len(BITS))[mixtures.argmax(1)]
    mixtures = mixtures.to(device)
    calls = len(o.x) if n == 1 else 1  # several coalitions fit no cache
    compiled = formula()
    picked = [0] if mixed else [int(mixtures[0].argmax())]
    each = [(c, *ops.bounds(BITS[c])) for c in (range(len(BITS)) if mixed else picked)]
    moved = _bytes((1 + n) * o.x[0].nbytes, device)
    sides: dict[str, Side] = {
        "ours": lambda k: ops.coalition_fake_quantize(o.x[k], o.scale, None, o.low, o.high, mixtures, axis=0),
        "copy": lambda k: moved.clone(),
        "B3": lambda k: [compiled(o.x[k], o.scale[c], low, high) for c, low, high in each],
    }
    theirs = sum(y.float() * float(mixtures[0, c]) for y, (c, *_) in zip(sides["B3"](0), each, strict=True))
    _agree("B3", sides["ours"](0)[0], theirs, o.scale)
    row = _row(sides, calls, (1 + n) * o.x[0].nbytes, device, {"B3": n})
    return row | _goal(row, "of copy", 0.85)


def weights(model: nn.Module, n: int, device: torch.device) -> dict[str, Any]:
    """All weights of a model for n assignments in one launch, beside one a layer, and a copy of as many bytes."""
    model = model.to(device)
    layers = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    low, high = (torch.tensor(v, dtype=torch.int32, device=device) for v in zip(*map(ops.bounds, BITS), strict=True))
    scales = [torch.stack([w.flatten(1).abs().amax(1) / h for h in high]) for w in layers]
    pick = torch.randint(0, len(BITS), (len(layers), n), generator=torch.Generator().manual_seed(2))
    mixtures = [torch.eye(len(BITS))[p].to(device) for p in pick]
    lows, highs = [low] * len(layers), [high] * len(layers)
    size = sum(w.nbytes for w in layers)
    moved = _bytes((1 + n) * size, device)
    sides: dict[str, Side] = {
        "ours": lambda k: ops.coalition_fake_quantize_list(layers, scales, [], lows, highs, mixtures, axis=0),
        "copy": lambda k: moved.clone(),
        "layer by layer": lambda k: [
            ops.coalition_fake_quantize(w, s, None, low, high, m, axis=0)
            for w, s, m in zip(layers, scales, mixtures, strict=True)
        ],
    }
    for ours, theirs in zip(sides["ours"](0), sides["layer by layer"](0), strict=True):
        if not torch.equal(ours, theirs):
            raise AssertionError("one launch and one a layer differ")
    row = _row(sides, 1, (1 + n) * size, device)
    return row | _goal(row, "of copy", 0.85)


def cases(device: torch.device) -> Iterator[Case]:
    """Every case by name, to be run."""
    for dtype in DTYPES:
        for elements in ELEMENTS:
            kind = f"{str(dtype).removeprefix('torch.')}, {elements} elements"
            for per_channel in (False, True):
                name = f"fake_quantize per {'channel' if per_channel else 'tensor'}, {kind}"
                yield name, partial(fake_quantize, elements, dtype, per_channel, device)
            for n in COALITIONS:
                for mixed in (True, False):
                    if n * elements <= max(ELEMENTS):
                        name = f"{n} coalition{'s' * (n > 1)}, {'mixed' if mixed else 'one-hot'}, {kind}"
                        yield name, partial(coalition, elements, n, mixed, dtype, device)
    for n in COALITIONS:
        yield f"weights of ResNet-50, {n} assignments", lambda n=n: weights(resnet50(), n, device)


def _bytes(count: int, device: torch.device) -> Tensor:
    """What a copy of reads and writes `count` bytes."""
    return torch.randint(0, 100, (count // 2,), dtype=torch.uint8, device=device)


def _row(
    sides: dict[str, Side], calls: int, bytes_: int, device: torch.device, times: dict[str, int] | None = None
) -> dict[str, Any]:
    """Seconds of a replayed call of every side as ratios of ours; a side may stand for `times` as many calls."""
    found = replayed(sides, calls, device)
    found |= {name: found[name] * many for name, many in (times or {}).items()}
    one_by_one = medians({"ours": sides["ours"]}, calls, device)["ours"]
    ours = found.pop("ours")
    row = {"µs": 1e6 * ours, "µs, one by one": 1e6 * one_by_one, "GB/s": bytes_ / ours / 1e9}
    return row | {"of copy" if name == "copy" else f"vs {name}": value / ours for name, value in found.items()}


def _goal(row: dict[str, Any], ratio: str, least: float) -> dict[str, Any]:
    return {"wanted": f"{ratio} >= {least:.2g}", "met": row[ratio] >= least} if ratio in row else {}


def _agree(name: str, ours: Any, theirs: Any, scale: Tensor) -> None:
    """Another rounding may be a step on; more is another function."""
    step = 1.1 * float(scale.max())
    if not (ours.float() - theirs.float()).abs().max() <= step:
        raise AssertionError(f"{name} computes something else")
