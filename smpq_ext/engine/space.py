"""The slots of a model: which are searched, among which widths, and which are fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smpq_ext.core import FLOAT_BITS, Slot, SmpqError, Space
from smpq_ext.engine.layers import Layer
from smpq_ext.typed import is_whole


def candidates(name: str, bits: Sequence[int], empty: bool = False) -> tuple[int, ...]:
    """The widths of an argument, ascending. Raises SmpqError where they are none."""
    try:
        widths = tuple(sorted({int(b) for b in bits}))
        good = all(is_whole(b) for b in bits) and all(1 <= b <= 16 for b in widths)
    except (TypeError, ValueError):
        good, widths = False, ()
    if not good or not (widths or empty):
        raise SmpqError(f"{name}: widths from 1 to 16, such as (2, 4, 8), not {bits!r}")
    return widths


def make_space(
    layers: list[Layer],
    weight_bits: tuple[int, ...],
    activation_bits: tuple[int, ...],
    fixed: Mapping[str, int | str] | None,
    left_out: Mapping[str, str],
) -> Space:
    """The searched and the fixed slots; weights of one Parameter are tied, and its elements counted once."""
    slots: list[Slot] = []
    for layer in layers:
        own = layer.shares is None
        weight = layer.weight
        slots.append(Slot(layer.name, "weight", weight.numel() * own, layer.macs, weight.shape[layer.axis] * own))
        slots.append(Slot(layer.name, "activation", layer.elements, layer.macs, 1))
    if fixed is None:
        fixed = {layers[0].name: 8, layers[-1].name: 8}
    names = {s.name for s in slots} | {layer.name for layer in layers}
    for key, value in fixed.items():
        if key not in names:
            raise SmpqError(f"fixed: {key!r} is no slot or layer; there are {', '.join(sorted(s.name for s in slots))}")
        if value != "float" and not (is_whole(value) and (1 <= int(value) <= 16 or value == FLOAT_BITS)):
            raise SmpqError(f"fixed: {key}: a width from 1 to 16, or 'float', not {value!r}")
    owner = {layer.name: layer.shares or layer.name for layer in layers}
    width: dict[str, int] = {}
    for slot in slots:
        weightless = slot.kind == "activation" and not activation_bits
        wanted = fixed.get(slot.name) or ("float" if weightless else fixed.get(slot.layer))
        if wanted is not None:
            width[slot.name] = FLOAT_BITS if wanted == "float" else int(wanted)
    for slot in slots:  # a fixed weight fixes all that share its Parameter
        if slot.kind == "weight" and slot.name in width:
            for other in (s for s in slots if s.kind == "weight" and owner[s.layer] == owner[slot.layer]):
                if width.setdefault(other.name, width[slot.name]) != width[slot.name]:
                    raise SmpqError(f"fixed: {slot.name} and {other.name} are one Parameter and need one width")
    searched = [s for s in slots if s.name not in width]
    if not searched:
        some = f" (left out: {'; '.join(f'{k}: {why}' for k, why in left_out.items())})" if left_out else ""
        raise SmpqError(
            f"fixed: every slot is fixed, nothing is left to search; give fixed={{}} to search them all{some}"
        )
    tied: dict[str, list[int]] = {}
    for k, slot in enumerate(searched):
        if slot.kind == "weight":
            tied.setdefault(owner[slot.layer], []).append(k)
    return Space(
        tuple(searched),
        tuple(weight_bits if s.kind == "weight" else activation_bits for s in searched),
        tuple((s, width[s.name]) for s in slots if s.name in width),
        tuple(tuple(group) for group in tied.values() if len(group) > 1),
    )
