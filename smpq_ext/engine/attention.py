"""Attention in lockstep: queries, keys and values of other rows each, none of which is gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smpq_ext.engine.capture import ATTENTION, Graph, Step, Value


@dataclass(frozen=True)
class Attention:
    """One that torch.ops.smpq.coalition_attention computes: no mask but the causal one, as many heads everywhere."""

    operands: tuple[int, int, int]  # the steps that give queries, keys and values
    causal: bool
    scale: float

    def __call__(self, values: Mapping[int, Any], rows: tuple[Tensor, ...], samples: int) -> Tensor:
        """[rows * samples, heads, queries, size], row r from row rows[k][r] of operand k [its rows * samples, ...]."""
        q, k, v = (values[step] for step in self.operands)
        out: Tensor = torch.ops.smpq.coalition_attention(q, k, v, *rows, samples, self.causal, self.scale)
        return out


def find(graph: Graph) -> dict[int, Attention]:
    """By their step, those that the op computes: on the CPU faster than torch's own (docs/performance.md)."""
    found = {}
    for i, step in enumerate(graph.steps):
        attention = _attention(graph, step) if step.target is ATTENTION else None
        if attention is not None:
            found[i] = attention
    return found


def _attention(graph: Graph, step: Step) -> Attention | None:
    mask, _, causal = (*step.args[3:], *(None, 0.0, False)[len(step.args) - 3 :])
    mask, causal = step.kwargs.get("attn_mask", mask), step.kwargs.get("is_causal", causal)
    if mask is not None or step.kwargs.get("enable_gqa"):
        return None
    if not all(isinstance(x, Value) and graph.steps[x.step].place is not None for x in step.args[:3]):
        return None
    operands = tuple(x.step for x in step.args[:3])
    q, k, v = (graph.kinds[x] for x in operands)
    if any(len(shape) != 4 or dtype != torch.float32 for shape, dtype in (q, k, v)):
        return None
    if not (q[0][:2] == k[0][:2] == v[0][:2]) or any(not isinstance(size, int) for x in (q, k, v) for size in x[0][1:]):
        return None
    scale = step.kwargs.get("scale")
    return Attention(operands, bool(causal), q[0][3] ** -0.5 if scale is None else float(scale))
