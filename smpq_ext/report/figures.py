"""The figures of a result, as SVG: scores with errors, sensitivities, predicted against measured loss."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from smpq_ext.core import Result
from smpq_ext.report.tables import with_error

ROW, CELL = 0.22, 0.82  # inches of one cell of the heat map
BLOCK = 32  # rows of the heat map under one heading
NAME = 38  # letters of a name; longer ones lose their middle
TINY = 1e-100  # a score below shows no colour
COLOURS = {"weight": "#3b6fb6", "activation": "#d98032"}
INK, QUIET = "#1d2430", "#8a93a3"
FRAME: dict[str, Any] = {"fill": False, "edgecolor": INK, "linewidth": 1.6, "zorder": 3}
STYLE: Any = {
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called $x$
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text: small files
    "svg.hashsalt": "smpq",  # equal results give equal bytes
}


def figures(result: Result) -> dict[str, bytes]:
    """SVG by name, as far as the result holds what they show: "scores", "sensitivity", "predicted"."""
    drawn = {}
    for name, draw in _DRAW.items():
        with mpl.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the SVG's reader may have a font that has it
            figure = draw(result)
            if figure is not None:
                drawn[name] = _svg(figure)
    return drawn


def scores(result: Result) -> Figure | None:
    """Predicted damage ± standard error of every searched slot at every width; the plan's choice is framed."""
    if result.scores is None:
        return None
    space = result.space
    errors = _known(result.score_errors, result.scores)
    layers = list(dict.fromkeys(s.layer for s in space.slots))
    row = {name: 1 + i + i // BLOCK for i, name in enumerate(layers)}  # a heading above every block
    bottom = row[layers[-1]] + 1
    top = float(result.scores[np.isfinite(result.scores)].max(initial=0.0))
    top = top if top > TINY else 1.0
    noise = float(np.median(errors[errors > 0])) if (errors > 0).any() else 0.0
    faint = min(max(top * 1e-4, noise), top / 10)  # what is within the noise is pale
    norm, colours = LogNorm(faint, top, clip=True), mpl.colormaps["YlOrRd"]
    kinds = [k for k in COLOURS if any(s.kind == k for s in space.slots)]
    pairs = list(zip(space.slots, space.candidates, strict=True))
    widths = {k: sorted({b for slot, c in pairs if slot.kind == k for b in c}) for k in kinds}
    label = 0.068 * max(len(_short(name)) for name in layers) + 0.25
    figure, axes = _panels(label, [CELL * len(widths[k]) for k in kinds], ROW * bottom, above=0.25, below=0.75, gap=0.2)
    for axis, kind in zip(axes, kinds, strict=True):
        grid = np.full((bottom, len(widths[kind])), np.nan)
        for i, (slot, candidates) in enumerate(pairs):
            for k, bits in enumerate(candidates if slot.kind == kind else ()):
                x, y, value = widths[kind].index(bits), row[slot.layer], float(result.scores[i, k])
                grid[y, x] = max(value, faint) if np.isfinite(value) else np.nan
                colour = "white" if value > 0 and norm(value) > 0.62 else INK
                text = with_error(value, float(errors[i, k]), digits=1)
                axis.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=6, color=colour)
                if bits == result.plan.bits[slot.name]:
                    axis.add_patch(Rectangle((x + 0.02, y + 0.06), 0.95, 0.87, **FRAME))
        axis.pcolormesh(np.ma.masked_invalid(grid), norm=norm, cmap=colours, edgecolors="white", linewidth=0.6)
        for y in range(0, bottom, BLOCK + 1):
            for x, bits in enumerate(widths[kind]):
                axis.text(x + 0.5, y + 0.55, f"{bits} bits", ha="center", va="center_baseline")
        axis.set(xlim=(0, len(widths[kind])), ylim=(bottom, 0), xticks=[], yticks=[], title=f"{kind}s")
        axis.spines[:].set_visible(False)
    axes[0].set_yticks([row[name] + 0.5 for name in layers], [_short(name) for name in layers])
    axes[0].tick_params(length=0)
    wide, high = figure.get_size_inches()
    bar = figure.add_axes((label / wide, 0.42 / high, 2.4 / wide, 0.1 / high))
    figure.colorbar(mpl.cm.ScalarMappable(norm, colours), cax=bar, orientation="horizontal", format="{x:g}")
    bar.tick_params(labelsize=6, length=2)
    bar.minorticks_off()
    figure.text((label + 2.55) / wide, 0.43 / high, "predicted damage ± standard error; framed: the plan", fontsize=7)
    return figure


def sensitivity(result: Result) -> Figure | None:
    """One bar per slot with its standard error, the largest first: Shapley values, or scores at the lowest width."""
    slots = result.space.slots
    known: NDArray[np.float64] | None
    if result.attribution is not None and len(result.attribution.values) == len(slots):
        values, known = result.attribution.values, result.attribution.standard_errors
        label = "Shapley value of the slot near the plan (loss)"
    elif result.scores is not None:
        values = np.where(np.isfinite(result.scores[:, 0]), result.scores[:, 0], 0)
        known = None if result.score_errors is None else result.score_errors[:, 0]
        label = "predicted damage of the slot's lowest width"
    else:
        return None
    errors = _known(known, values)
    order = np.argsort(-values, kind="stable")
    names = [_short(slots[i].name) for i in order]
    margin = 0.068 * max(map(len, names)) + 0.25
    figure, (axis,) = _panels(margin, [5.6], 0.19 * len(slots), above=0.35, below=0.5)
    axis.barh(
        range(len(slots)),
        values[order],
        xerr=errors[order],
        height=0.72,
        color=[COLOURS[slots[i].kind] for i in order],
        error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 1.5},
    )
    reach = float((values + errors).max(initial=0.0)) or 1.0
    for y, i in enumerate(order):
        x = max(float(values[i] + errors[i]), 0.0) + 0.012 * reach
        axis.text(x, y, f"{result.plan.bits[slots[i].name]} bits", va="center", fontsize=6, color=QUIET)
    axis.set_yticks(range(len(slots)), names)
    axis.set(ylim=(len(slots) - 0.4, -0.6), xlabel=label)
    axis.set_xlim(right=1.1 * reach)
    axis.axvline(0, color=QUIET, linewidth=0.8)
    axis.tick_params(axis="y", length=0)
    kinds = [k for k in COLOURS if any(s.kind == k for s in slots)]
    above = 1 + 0.08 / (0.19 * len(slots))
    axis.legend(
        handles=[Patch(color=COLOURS[k], label=k) for k in kinds],
        loc="lower right",
        bbox_to_anchor=(1, above),
        ncols=2,
        frameon=False,
        fontsize=7,
        borderaxespad=0,
    )
    return figure


def predicted(result: Result) -> Figure | None:
    """Loss as predicted and as measured, of every assignment asked near the budget, and of the plan."""
    trace = np.array(result.trace, np.float64).reshape(-1, 2)
    trace = trace[np.isfinite(trace).all(axis=1)]
    if not len(trace):
        return None
    figure, (axis,) = _panels(0.7, [4.6], 4.0, above=0.2, below=0.5, right=3.2)
    seen = trace
    axis.scatter(*trace.T, s=12, color=COLOURS["weight"], alpha=0.55, linewidths=0, label=_described(trace))
    if result.predicted_loss is not None:
        plan = np.array([[result.predicted_loss, result.measured_loss]])
        seen = np.concatenate([trace, plan])
        colour = COLOURS["activation"]
        axis.scatter(*plan.T, s=110, marker="*", color=colour, edgecolors=INK, linewidths=0.6, label="plan", zorder=3)
    low, high = float(seen.min()), float(seen.max())
    if low > 0 and high / low > 10:
        axis.set(xscale="log", yscale="log")
        for way in (axis.xaxis, axis.yaxis):
            way.set_major_locator(LogLocator(subs=(1, 2, 5)))
            way.set_major_formatter("{x:g}")
            way.set_minor_locator(NullLocator())
        ends = (low / 1.1, high * 1.1)
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        ends = (low - pad, high + pad)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.plot(ends, ends, color=QUIET, linewidth=0.9, linestyle="--", zorder=0, label="equal")
    axis.set(xlim=ends, ylim=ends, xlabel="predicted loss", ylabel="measured loss")
    axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


_DRAW: dict[str, Callable[[Result], Figure | None]] = {
    "scores": scores,
    "sensitivity": sensitivity,
    "predicted": predicted,
}


def _panels(
    left: float,
    across: Sequence[float],
    height: float,
    *,
    above: float,
    below: float,
    gap: float = 0.0,
    right: float = 0.2,
) -> tuple[Figure, list[Any]]:
    """A figure of exactly these panels side by side, all measures in inches."""
    whole = (left + sum(across) + gap * (len(across) - 1) + right, above + height + below)
    figure = Figure(figsize=whole)
    axes = []
    for wide in across:
        axes.append(figure.add_axes((left / whole[0], below / whole[1], wide / whole[0], height / whole[1])))
        left += wide + gap
    return figure, axes


def _known(errors: NDArray[np.float64] | None, like: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard errors, 0 where there are none; one that is not known is as large as the largest value."""
    largest = float(np.abs(like[np.isfinite(like)]).max(initial=0.0))
    return np.zeros_like(like) if errors is None else np.nan_to_num(errors, nan=largest, posinf=largest)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return out.getvalue()


def _described(trace: NDArray[np.float64]) -> str:
    predicted, measured = trace.argsort(axis=0, kind="stable").argsort(axis=0).T
    rank = f",\nrank correlation {np.corrcoef(predicted, measured).item(0, 1):.2f}" if len(trace) > 2 else ""
    return f"{len(trace)} assignments near the plan{rank}"


def _short(name: str) -> str:
    name = "".join(c if c.isprintable() else "�" for c in name)  # XML has no word for most of the others
    half = (NAME - 1) // 2
    return name if len(name) <= NAME else f"{name[:half]}…{name[-half:]}"
