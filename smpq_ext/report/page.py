"""One self-contained page: it needs no network and no script, and names from the model are escaped."""

from __future__ import annotations

import base64
import os
from html import escape
from pathlib import Path

import smpq_ext
from smpq_ext.core import FLOAT_BITS, Result, write_text
from smpq_ext.report import tables
from smpq_ext.report.figures import figures

CAPTIONS = {
    "scores": "What each slot alone is predicted to cost at each width",
    "sensitivity": "What a slot is worth",
    "predicted": "Predicted against measured loss",
}

STYLE = """
:root { color-scheme: light; --ink: #1d2430; --quiet: #667084; --line: #e3e6ec; --accent: #3b6fb6; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 62rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.keys { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.keys div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; }
.keys b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow: auto; max-height: 44rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.wide table { width: 100%; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { position: sticky; top: 0; background: #f6f7fa; font-weight: 600; }
td.bits { background: linear-gradient(90deg, #cfdef2 var(--share), transparent var(--share)); }
.words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0 0 1.6rem; }
figure .wide { padding: .6rem; }
img { display: block; }
code, pre { font: .88rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { background: #f6f7fa; border-radius: .5rem; padding: .8rem 1rem; overflow: auto; }
@media print { .wide { max-height: none; } }
"""

APPLY = """import json, smpq_ext

plan = smpq_ext.Plan.from_json(json.load(open("plan.json")))
quantized = smpq_ext.apply(model, plan)"""


def write(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Write report.html and figures/<name>.svg into `folder`; returns the path of the page."""
    drawn = figures(result)
    target = Path(folder)
    (target / "figures").mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        (target / "figures" / f"{name}.svg").write_bytes(svg)
    write_text(target / "report.html", render(result, drawn))
    return target / "report.html"


def render(result: Result, drawn: dict[str, bytes]) -> str:
    """The page as HTML; `drawn` are the figures as SVG by name."""
    limits = ", ".join(f"{name} ≤ {tables.number(limit)}" for name, limit in result.budget.items())
    widest = max(8, *(b for b in result.plan.bits.values() if b != FLOAT_BITS))
    searched = {s.name: result.plan.bits[s.name] for s in result.space.slots}
    keys = {
        "measured loss of the plan": tables.number(result.measured_loss),
        "predicted": "–" if result.predicted_loss is None else tables.number(result.predicted_loss),
        "float model": tables.number(result.float_loss),
        "evaluations": f"{result.evaluations:,}",
        "seconds": tables.number(sum(result.seconds.values())),
    }
    parts = [
        "<h1>How many bits each layer gets</h1>",
        f"<p class=quiet>method {escape(result.plan.method)}, seed {result.plan.seed}, budget {escape(limits)}</p>",
        f"<p>{escape(result.finding[:1].upper() + result.finding[1:])}.</p>" if result.finding else "",
        "<div class=keys>",
        *(f"<div><b>{escape(value)}</b>{escape(key)}</div>" for key, value in keys.items()),
        "</div>",
        "<h2>Cost against budget</h2>",
        _table(tables.costs(result)),
        "<h2>Loss</h2>",
        _table(tables.losses(result)),
        "<p class=quiet>Measured by a forward pass of the quantized model over the calibration data.</p>",
        "<h2>The plan</h2>",
        f"<p class=quiet>{len(searched)} slots were searched; {tables.histogram(searched)}.</p>",
        _table(tables.layers(result), full=widest),
        "<h2>Why</h2>",
        *(_figure(CAPTIONS[name], svg) for name, svg in drawn.items()),
        "" if drawn else "<p>This method keeps no scores.</p>",
    ]
    if (pairs := tables.pairs(result)) is not None:
        parts += [
            "<h2>Which slots interact</h2>",
            "<p class=quiet>What two slots are worth in concert: above 0, raising one is worth more where the other is "
            "raised. Those that stand out most from their standard errors.</p>",
            _table(pairs),
        ]
    if result.left_out:
        parts += ["<h2>Not quantized</h2>", _table(tables.left_out(result))]
    parts += [
        "<h2>How it was found</h2>",
        _table(tables.run(result)),
        f"<h2>Use it</h2><pre>{escape(APPLY)}</pre>",
        f"<p class=quiet>Page written by smpq_ext {smpq_ext.__version__}.</p>",
    ]
    body = "\n".join(filter(None, parts))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"smpq: {result.plan.method}, {limits}")}</title><style>{STYLE}</style></head>
<body>
{body}
</body></html>
"""


def _table(table: tables.Table, full: int | None = None) -> str:
    """HTML of a table; with `full`, its widths get a bar that fills the cell at so many bits."""

    def cell(column: str, text: str) -> str:
        if full and column in ("weight", "activation") and text:
            width = text.split(maxsplit=1)[0]
            share = 100 if width == "float" else 100 * int(width) / full
            return f'<td class="bits" style="--share: {share:.1f}%">{escape(text)}</td>'
        return f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = ("".join(cell(c, text) for c, text in zip(table.columns, row, strict=True)) for row in table.rows)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    style = "wide words" if table.words else "wide"
    return f'<div class="{style}"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(caption: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="wide">{image}</div></figure>'
