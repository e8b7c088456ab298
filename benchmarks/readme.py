"""Puts the tables of benchmarks/results/ into README.md, between the lines that name them.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, markdown

README = Path(__file__).parent.parent / "README.md"
PERCENT = {"search_resnet20": "top-1, %"}  # scores from 0 to 1
HEADS = {**PERCENT, "search_stories": "NLL per token"}
SAMPLED = "near 3"  # the game of benchmarks/sampling.py that is shown
ENGINE = ("model", "game", "ours µs", "B2 µs", "B3 µs", "B4 µs", "vs B2", "vs B3", "vs B4", "int8 limit µs")


def search(name: str, rows: list[dict[str, Any]]) -> str:
    """Methods by budgets; the last row says who wins."""
    scale = 100 if name in PERCENT else 1

    def cell(text: str) -> str:
        found = re.fullmatch(r"([-+]?[\d.]+) ± ([\d.]+)(?: against (\w+): (\w+))?(.*)", text)
        if found is None:
            return text
        value, error, other, word, rest = found.groups()
        digits = 1 if scale == 100 else len(value.partition(".")[2])
        sign = "+" if other else ""
        told = f"{float(value) * scale:{sign}.{digits}f} ± {float(error) * scale:.{digits}f}"
        return f"{word} ({told} against {other})" if other else told + rest

    heads = {"method": HEADS[name]}
    return markdown([{heads.get(key, key): cell(value) for key, value in row.items()} for row in rows])


def engine(name: str, rows: list[dict[str, Any]]) -> str:
    return markdown([{key: row.get(key) for key in ENGINE} for row in rows])


def sampling(name: str, rows: list[dict[str, Any]]) -> str:
    """Errors of the estimators on one game, by budget."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["game"] == SAMPLED:
            found.setdefault(row["estimator"], {"error with": row["estimator"]})[row["budget"]] = row["error"]
    budgets = sorted(
        {key for row in found.values() for key in row if key != "error with"}, key=lambda b: int(b.split()[0])
    )
    order = sorted(found.values(), key=lambda row: min(v for k, v in row.items() if k != "error with"))
    return markdown([{key: row.get(key) for key in ("error with", *budgets)} for row in order])


TABLES = {"search_resnet20": search, "search_stories": search, "engine": engine, "sampling": sampling}


def main() -> None:
    text = README.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
            text = f"{before}{begin}\n{table(name, rows)}\n\n{end}{rest.partition(end)[2]}"
    README.write_text(text)


if __name__ == "__main__":
    main()
