"""Runs every method on one model at equal budget, judges the plans on held-out data, and keeps what came out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import smpq_ext
from benchmarks.environment import facts, save_table
from smpq_ext.core import Infeasible, Result

METHODS = (
    "uniform",
    "random",
    "inverted",
    "gradient",
    "hessian",
    "sqnr",
    "single",
    "local",
    "smpq",
    "shapley",
)
Judge = Callable[[nn.Module], NDArray[np.float64]]  # a model to its score for each held-out sample


@dataclass(frozen=True)
class Task:
    """One search to run with every method: `group` is its column in the table, `name` tells its seed as well."""

    group: str
    name: str
    batches: Sequence[Any]
    settings: dict[str, Any]


def arguments(doc: str, name: str, budgets: Sequence[float], methods: Sequence[str] = METHODS) -> argparse.Namespace:
    """The command line that the search scripts share; sets torch's threads."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(budgets))
    parser.add_argument("--methods", nargs="+", default=list(methods))
    parser.add_argument("--cells", type=Path, default=Path.home() / ".cache/smpq_ext" / name)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only-table", action="store_true", help="tabulate what was measured before")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def run(
    name: str, note: str, given: argparse.Namespace, model: nn.Module, judge: Judge, tasks: Iterable[Task], **table: Any
) -> None:
    """Every method on every task, then the table of all that is known."""
    cells = Cells(given.cells, measure=not given.only_table)
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for task in tasks:
        for method in given.methods:
            cell = cells.run(task.name, model, task.batches, judge, method, **task.settings)
            if cell is not None:
                groups.setdefault(task.group, {}).setdefault(method, []).append(cell)
    commits = sorted(
        {c.get("commit", "unknown") for found in groups.values() for cells in found.values() for c in cells}
    )
    note = f"{note}\nFloat model: {judge(model).mean():.4f}. Searched at the commits {', '.join(commits)}."
    save_table(name, rows_of(groups, seeds=given.seeds, **table), note)


class Cells:
    """What was measured so far, in a folder outside the repository; a cell that is there is not run again."""

    def __init__(self, folder: Path, measure: bool = True) -> None:
        self.folder, self.measure = folder, measure
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, model: nn.Module, batches: Sequence[Any], judge: Judge, method: str, **settings: Any
    ) -> dict[str, Any] | None:
        """One search, applied and judged: scores per held-out sample and cost; None where there is no plan."""
        path = self.folder / f"{name}-{method}.json"
        if path.exists():
            return json.loads(path.read_text())
        if not self.measure:
            return None
        start = time.perf_counter()
        try:
            result: Result = smpq_ext.search(
                model, batches, method=method, store=self.folder / "evaluations.sqlite", **settings
            )
        except Infeasible as error:
            print(f"{name} {method}: {error}", flush=True)
            path.write_text("null")
            return None
        scores = judge(smpq_ext.apply(model, result.plan))
        cell = {
            "scores": np.round(scores, 6).tolist(),
            "measured_loss": result.measured_loss,
            "evaluations": result.evaluations,
            "seconds": time.perf_counter() - start,
            "search": result.seconds["search"],
            "cost": dict(result.cost),
            "finding": result.finding,
            "bits": result.plan.bits,
            "commit": facts()["commit"],
        }
        path.write_text(json.dumps(cell))
        print(
            f"{name} {method}: score {scores.mean():.4f}, loss {result.measured_loss:.4f}, "
            f"{result.evaluations} evaluations, {cell['seconds']:.0f} s. {result.finding}",
            flush=True,
        )
        return cell


def compare(cells: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of the scores of two methods over the seeds, and its standard error.

    Paired: the same seeds and the same held-out samples. Two sources of noise are added: that of the held-out samples
    (the seeds' mean difference, sample by sample) and that of the seeds, from the spread of their mean differences.
    """
    difference = np.array([np.array(a["scores"]) - np.array(b["scores"]) for a, b in zip(cells, others, strict=True)])
    samples = difference.mean(axis=0).std(ddof=1) / np.sqrt(difference.shape[1])
    seeds = difference.mean(axis=1).std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(np.hypot(samples, seeds))


def summary(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean score over seeds and held-out samples, and its standard error from both."""
    scores = np.array([cell["scores"] for cell in cells])
    samples = scores.mean(axis=0).std(ddof=1) / np.sqrt(scores.shape[1])
    seeds = scores.mean(axis=1).std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return float(scores.mean()), float(np.hypot(samples, seeds))


def rows_of(
    groups: dict[str, dict[str, list[dict[str, Any]]]], better: str, digits: int, seeds: int
) -> list[dict[str, Any]]:
    """A row per method, a column per group (mode and budget), «mean ± standard error»; then who shapley beats."""
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        for group, found in groups.items():
            cells = found.get(method)
            row[group] = "–" if not cells else "{:.{d}f} ± {:.{d}f}".format(*summary(cells), d=digits)
            if cells and len(cells) < seeds:
                row[group] += f" ({len(cells)} of {seeds} seeds)"
        if any(method in found for found in groups.values()):
            rows.append(row)
    verdict: dict[str, Any] = {"method": f"shapley against the best other ({better})"}
    for group, found in groups.items():
        mine = found.get("shapley", [])
        others = {m: c for m, c in found.items() if m != "shapley" and len(c) == len(mine)}
        if not others:
            continue
        sign = 1.0 if better == "higher" else -1.0
        best = max(others, key=lambda m: sign * summary(others[m])[0])
        mean, error = compare(mine, others[best])
        word = "tie" if abs(mean) <= 2 * error else "ahead" if sign * mean > 0 else "behind"
        verdict[group] = f"{mean:+.{digits}f} ± {error:.{digits}f} against {best}: {word}"
    return [*rows, verdict]


def judge_accuracy(inputs: torch.Tensor, targets: torch.Tensor, batch: int = 500) -> Judge:
    """Top-1 correctness, 0 or 1 for each sample."""

    def judge(model: nn.Module) -> NDArray[np.float64]:
        model = model.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            found = [model(x.contiguous(memory_format=torch.channels_last)).argmax(-1) for x in inputs.split(batch)]
        return (torch.cat(found) == targets).double().numpy()

    return judge
