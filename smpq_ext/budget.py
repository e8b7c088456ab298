"""Budgets as the user writes them, and what an assignment costs in the same units."""

from __future__ import annotations

import math

import numpy as np

from smpq_ext.core import FLOAT_BITS, Assignments, Budget, Limit, Product, Slot, SmpqError, Space, Table

KINDS = ("weight-bits", "activation-bits", "bytes", "bitops")


def parse(text: str, space: Space) -> Budget:
    """The budget that `text` describes, such as "weight-bits=3" or "bytes=250000,bitops=0.1".

    - weight-bits: mean width of the searched weight slots, weighted by parameters
    - activation-bits: plain mean width of the searched activation slots
    - bytes: of all weights, elements * bits / 8 + 4 for every scale; float weights have 32 bits and no scales
    - bitops: multiply-accumulates * weight bits * activation bits over all layers, as a share of that of the model with
      8 bits everywhere; what is not quantized counts 32 bits

    Fixed slots count in bytes and bitops, not in the means. Entries of the cost tables where a slot has no candidate
    are +inf.

    Raises SmpqError on anything else.
    """
    known = f"known are {', '.join(KINDS)}, such as 'weight-bits=3' or 'bytes=250000,bitops=0.1'"
    limits: dict[str, Limit] = {}
    for part in str(text).split(","):
        kind, equals, number = (piece.strip() for piece in part.partition("="))
        if kind not in KINDS or not equals:
            raise SmpqError(f"budget: {part.strip()!r} is not a limit; {known}")
        if kind in limits:
            raise SmpqError(f"budget: {kind} is given twice in {text!r}")
        try:
            value = float(number)
        except ValueError:
            raise SmpqError(f"budget: {number!r} in {part.strip()!r} is not a number") from None
        if not 0 < value < math.inf:
            raise SmpqError(f"budget: {part.strip()!r} must be a number above 0")
        limit = _limit(kind, value, space)
        if limit is None:
            raise SmpqError(f"budget: {part.strip()!r} limits nothing, no slot that is searched counts in {kind}")
        limits[kind] = limit
    return Budget(tuple(limits.values()), space.tied)


def costs(space: Space, assignment: Assignments) -> dict[str, float]:
    """What the assignment [slots] costs, by kind of limit; kinds in which no searched slot counts are left out."""
    found = {kind: _limit(kind, math.inf, space) for kind in KINDS}
    return {kind: float(limit.cost(assignment)[0]) for kind, limit in found.items() if limit is not None}


def _limit(kind: str, value: float, space: Space) -> Limit | None:
    """The limit of that kind, or None where no searched slot counts in it."""
    widths = np.where(space.mask, space.widths, np.inf)
    if kind == "bitops":
        return _bitops(value, space, widths)
    counted = "activation" if kind == "activation-bits" else "weight"
    slots = [(i, slot) for i, slot in enumerate(space.slots) if slot.kind == counted]
    if not slots:
        return None
    table = np.where(space.mask, 0.0, np.inf)
    if kind == "bytes":
        for i, slot in slots:
            table[i] = [_bytes(slot, bits) for bits in widths[i]]
        fixed = sum(_bytes(slot, bits) for slot, bits in space.fixed if slot.kind == "weight")
        return Limit(kind, "bytes", value, table, constant=fixed)
    shares = np.array([slot.elements if counted == "weight" else 1 for _, slot in slots], np.float64)
    for (i, _), share in zip(slots, shares / shares.sum(), strict=True):
        table[i] = share * widths[i]
    return Limit(kind, "bits", value, table)


def _bytes(slot: Slot, bits: float) -> float:
    return slot.elements * bits / 8 + (0 if bits == FLOAT_BITS else 4 * slot.scales)


def _bitops(value: float, space: Space, widths: Table) -> Limit | None:
    searched = {(slot.layer, slot.kind): i for i, slot in enumerate(space.slots)}
    fixed = {(slot.layer, slot.kind): bits for slot, bits in space.fixed}
    macs = {slot.layer: slot.macs for slot in [*space.slots, *(slot for slot, _ in space.fixed)]}
    whole = sum(macs.values()) * 8 * 8
    if not whole or not any(slot.macs for slot in space.slots):
        return None
    table = np.where(space.mask, 0.0, np.inf)
    products = []
    constant = 0.0
    for layer, count in macs.items():
        weight, activation = searched.get((layer, "weight")), searched.get((layer, "activation"))
        if weight is not None and activation is not None:
            cost = np.multiply.outer(widths[weight], widths[activation]) * count / whole
            products.append(Product(weight, activation, cost))
        elif weight is not None:
            table[weight] += widths[weight] * fixed.get((layer, "activation"), FLOAT_BITS) * count / whole
        elif activation is not None:
            table[activation] += widths[activation] * fixed.get((layer, "weight"), FLOAT_BITS) * count / whole
        else:
            both = fixed.get((layer, "weight"), FLOAT_BITS) * fixed.get((layer, "activation"), FLOAT_BITS)
            constant += both * count / whole
    return Limit("bitops", "of the 8-bit model's", value, table, tuple(products), constant)
