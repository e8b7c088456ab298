"""stories260K, weights only: NLL per token on stories 1800-1948 of every method's plan, at equal average widths.

35 linear layers from {2, 3, 4, 6, 8} bits per output channel, output (tied to the embedding) at 8; searched on the
NLL of 38 stories of 192 tokens.

    python -m benchmarks.search_stories [--seeds 3] [--budgets 2.5 3] [--methods ...] [--cells FOLDER]
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import data, models
from benchmarks.comparison import METHODS, Cells, Judge, rows_of
from benchmarks.environment import save_table

EVALUATIONS = 1340


def judge_nll(inputs: torch.Tensor, targets: torch.Tensor, batch: int = 50) -> Judge:
    """NLL per token of each story, weighted so that the mean over stories is the mean over tokens."""

    def judge(model: nn.Module) -> NDArray[np.float64]:
        total, count = [], []
        with torch.inference_mode():
            for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
                loss = nn.functional.cross_entropy(
                    model(x).flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100
                )
                total.append(loss.view(y.shape).sum(1))
                count.append((y != data.IGNORED).sum(1))
        tokens = torch.cat(count).double()
        return (torch.cat(total).double() / tokens.mean()).numpy()

    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--cells", type=Path, default=Path.home() / ".cache/smpq_ext/search_stories")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only-table", action="store_true", help="tabulate what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = models.load_llama()
    searched, test = data.experiment_stories()
    judge = judge_nll(*test)
    cells = Cells(arguments.cells, measure=not arguments.only_table)
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed, budget, method in product(range(arguments.seeds), arguments.budgets, arguments.methods):
        cell = cells.run(
            f"{budget:g}-{seed}",
            model,
            [searched],
            judge,
            method,
            bits=(2, 3, 4, 6, 8),
            activation_bits=(),
            fixed={"output": 8},
            budget=f"weight-bits={budget:g}",
            seed=seed,
            evaluations=EVALUATIONS,
        )
        if cell is not None:
            groups.setdefault(f"{budget:g} bits", {}).setdefault(method, []).append(cell)
    note = f"{__doc__}\nFloat model: {judge(model).mean():.4f}. {arguments.seeds} seeds on the same stories."
    save_table("search_stories", rows_of(groups, "lower", 3, arguments.seeds), note)


if __name__ == "__main__":
    main()
