"""What a result says, as plain tables of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from smpq_ext.core import FLOAT_BITS, Result


@dataclass(frozen=True)
class Table:
    """Column names and rows of cells; the first column reads from the left, the others too where they are words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False

    def text(self, most: int | None = None) -> str:
        """The table in columns of equal width, what a terminal might obey as "?".

        Beyond `most` rows its middle is left out, and said to be.
        """
        rows = [tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row) for row in self.rows]
        if most is not None and len(rows) > most:
            gone = len(rows) - most
            rows[most // 2 : most // 2 + gone] = [(f"... {gone} more", *[""] * (len(self.columns) - 1))]
        cells = [self.columns, *rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]

        def line(row: Iterable[str]) -> str:
            first, *rest = row
            aligned = map(str.ljust if self.words else str.rjust, rest, widths[1:])
            return "  ".join([first.ljust(widths[0]), *aligned]).rstrip()

        return "\n".join([line(self.columns), "  ".join("-" * w for w in widths), *map(line, rows)])


def layers(result: Result) -> Table:
    """One row per layer: widths (fixed ones are marked), sizes, and the damage predicted for these widths.

    Searched layers come in the order in which they run, then those that are fixed.
    """
    damage = chosen_damage(result)
    fixed = {slot.name for slot, _ in result.space.fixed}
    slots = {s.name: s for s in (*result.space.slots, *(s for s, _ in result.space.fixed))}
    rows = []
    for layer in dict.fromkeys(s.layer for s in slots.values()):
        pair = [slots.get(f"{layer}.{kind}") for kind in ("weight", "activation")]
        known = next(s for s in pair if s is not None)
        widths = [
            "" if s is None else width(result.plan.bits[s.name]) + (" fixed" if s.name in fixed else "") for s in pair
        ]
        sizes = [f"{pair[0].elements:,}" if pair[0] else "", f"{known.macs:,}"]
        rows.append((layer, *widths, *sizes, *("" if s is None else damage.get(s.name, "") for s in pair)))
    columns = ("layer", "weight", "activation", "parameters", "MACs", "weight damage", "activation damage")
    filled = [i for i, name in enumerate(columns) if i < 3 or any(row[i] for row in rows)]
    return Table(tuple(columns[i] for i in filled), tuple(tuple(row[i] for i in filled) for row in rows))


def chosen_damage(result: Result) -> dict[str, str]:
    """The predicted damage, with its standard error, of the width that each searched slot has in the plan."""
    if result.scores is None:
        return {}
    errors = np.zeros_like(result.scores) if result.score_errors is None else result.score_errors
    found = {}
    for i, (slot, widths) in enumerate(zip(result.space.slots, result.space.candidates, strict=True)):
        k = widths.index(result.plan.bits[slot.name])
        found[slot.name] = with_error(float(result.scores[i, k]), float(errors[i, k]))
    return found


def costs(result: Result) -> Table:
    """What the plan costs in every unit, beside the limits of the budget."""
    rows = []
    for name, cost in result.cost.items():
        limit = result.budget.get(name)
        share = "" if limit is None else f"{100 * cost / limit:.1f} %"
        rows.append((name, number(cost), "" if limit is None else number(limit), share))
    for kind, size in (("weight", lambda s: s.elements), ("activation", lambda s: 1)):
        slots = [s for s in (*result.space.slots, *(s for s, _ in result.space.fixed)) if s.kind == kind]
        total = sum(size(s) for s in slots)
        mean = sum(size(s) * result.plan.bits.get(s.name, FLOAT_BITS) for s in slots) / max(total, 1)
        rows.append((f"{kind}-bits, fixed slots included", number(mean), "", ""))
    return Table(("cost", "plan", "limit", "used"), tuple(rows))


def losses(result: Result) -> Table:
    """The loss of the float model and of the plan, as predicted and as measured by a forward pass."""
    rows = [("float model", number(result.float_loss), "")]
    if result.predicted_loss is not None:
        rows.append(("plan, predicted", number(result.predicted_loss), _difference(result.predicted_loss, result)))
    rows.append(("plan, measured", number(result.measured_loss), _difference(result.measured_loss, result)))
    return Table(("loss on the calibration data", "value", "above float"), tuple(rows))


def run(result: Result) -> Table:
    """How the plan was found: method, effort and what it takes to find it again."""
    seconds = " + ".join(f"{name} {number(s)}" for name, s in result.seconds.items())
    rows = [
        ("method", result.plan.method),
        ("seed", str(result.plan.seed)),
        ("evaluations", f"{result.evaluations:,}"),
        *([("estimator", reason)] if (reason := result.attribution.reason if result.attribution else "") else []),
        ("seconds", f"{number(sum(result.seconds.values()))} = {seconds}"),
        ("peak memory of a forward", f"{result.peak_bytes / 2**20:,.0f} MiB"),
        ("fingerprint", result.plan.fingerprint),
        *result.versions.items(),
    ]
    return Table(("run", ""), tuple(rows), words=True)


def pairs(result: Result, most: int = 10) -> Table | None:
    """The pairs of slots whose interaction stands out most from its standard error; None where none was estimated."""
    found = result.attribution
    if found is None or found.pairs is None or found.pair_errors is None:
        return None
    names = [slot.name for slot in result.space.slots]
    first, second = np.triu_indices(len(names), 1)
    values, errors = found.pairs[first, second], found.pair_errors[first, second]
    surest = np.argsort(-np.abs(values) / np.maximum(errors, 1e-300), kind="stable")[:most]
    rows = [
        (names[first[k]], names[second[k]], with_error(float(values[k]), float(errors[k])))
        for k in surest
        if values[k] != 0
    ]
    return Table(("slot", "and slot", "worth together, beyond each"), tuple(rows), words=True) if rows else None


def left_out(result: Result) -> Table:
    """The modules that are not quantized, with the reason."""
    return Table(("not quantized", "reason"), tuple(result.left_out.items()), words=True)


def width(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else str(bits)


def number(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    if not math.isfinite(value):
        return str(value)
    if (value == int(value) and abs(value) < 1e15) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def with_error(value: float, error: float, digits: int = 2) -> str:
    """Value ± error, as many decimals as the error's first digits need; "" where the value is not finite.

    "± ?" where the error is not, for then it is not known.
    """
    if not math.isfinite(value):
        return ""
    if not math.isfinite(error):
        return f"{value:.3g} ± ?"
    if not error > 0:
        return f"{value:.3g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(error)))
    if decimals > 3 + digits:
        return f"{value:.1e} ± {error:.0e}"
    value = round(value, decimals) + 0.0  # no -0
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def histogram(bits: Mapping[str, int]) -> str:
    """How many slots have each width, such as "2 bits: 4, 3 bits: 17"."""
    counted = {w: list(bits.values()).count(w) for w in sorted(set(bits.values()))}
    return ", ".join(f"{'float' if w == FLOAT_BITS else f'{w} bits'}: {n}" for w, n in counted.items())


def _difference(loss: float, result: Result) -> str:
    return f"{loss - result.float_loss:+.4g}"
