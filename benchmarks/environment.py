"""What a result was measured with, and the one way to keep it: benchmarks/results/<name>.json and .md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import smpq_ext
from smpq_ext import ops

RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, Any]


def facts() -> dict[str, Any]:
    """Machine, versions, command line and date."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *map(_short, sys.orig_argv[1:])]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],  # of the last minute: other jobs show here, and so does this one
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "smpq_ext": smpq_ext.__version__,
        "commit": _commit(),
        "kernels": ops._C.build_info() if ops.compiled else "plain torch: the extension is not built",
    }


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, one column per key in order of first appearance; numbers with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def note_of(doc: str | None) -> str:
    """What a script's docstring says of its table: all before the command that makes it."""
    return " ".join((doc or "").partition("    python")[0].split())


def save_table(name: str, rows: Sequence[Row], note: str = "", folder: Path = RESULTS) -> None:
    """Write the rows with the facts of this run to <folder>/<name>.json and .md; the note goes above the table."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = facts()
    data = {"name": name, "note": note, "machine": machine, "rows": list(map(dict, rows))}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    about = "\n".join(f"- {key}: {value}" for key, value in machine.items() if value is not None)
    parts = [f"# {name}", note, markdown(rows), about]
    (folder / f"{name}.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", r"\|")


def _short(argument: str) -> str:
    """An absolute path as its last part: the folders of a machine say nothing to a reader."""
    return Path(argument).name if argument.startswith("/") else argument


def _processor() -> str:
    """Model name, family and model number: a virtual machine often tells only the maker's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in pairs}
    name = known.get("model name", platform.machine())
    return f"{name} (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else name


def _commit() -> str | None:
    """The short commit, with "+" where tracked files differ from it; None outside a repository with commits."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "-s", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
