"""ResNet-20 on CIFAR-10 (JPEG): top-1 of every method's plan on the 10,000 test images, at equal average widths.

Weights and activations from {2, 3, 4, 6, 8} bits, first and last layer at 8; KL to the float model on 512 of the 5,000
training rows kept out of its fine-tuning. BatchNorm statistics kept, or re-estimated for every assignment.

    python -m benchmarks.search_resnet20 [--seeds 3] [--budgets 2.5 3 4] [--methods ...] [--cells FOLDER]
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data, models
from benchmarks.comparison import METHODS, Cells, judge_accuracy, rows_of
from benchmarks.environment import save_table

SAMPLES = 512
EVALUATIONS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m != "local"])
    parser.add_argument("--modes", nargs="+", default=["kept", "re-estimated"])
    parser.add_argument("--cells", type=Path, default=Path.home() / ".cache/smpq_ext/search_resnet20")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only-table", action="store_true", help="tabulate what was measured before")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = models.load_resnet20_jpeg()
    pool_x, pool_y = data.cifar10_kept_out()
    judge = judge_accuracy(*data.cifar10("test"))
    cells = Cells(arguments.cells, measure=not arguments.only_table)
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for seed in range(arguments.seeds):
        rows = np.sort(np.random.default_rng([7, seed]).permutation(len(pool_x))[:SAMPLES])
        batch = [(pool_x[rows], pool_y[rows])]
        for mode, budget, method in product(arguments.modes, arguments.budgets, arguments.methods):
            cell = cells.run(
                f"{mode}-{budget:g}-{seed}",
                model,
                batch,
                judge,
                method,
                bits=(2, 3, 4, 6, 8),
                budget=f"weight-bits={budget:g},activation-bits={budget:g}",
                loss="kl",
                renormalize=mode == "re-estimated",
                seed=seed,
                evaluations=EVALUATIONS,
            )
            if cell is not None:
                groups.setdefault(f"{mode}, {budget:g} bits", {}).setdefault(method, []).append(cell)
    note = f"{__doc__}\nFloat model: {judge(model).mean():.4f}. {arguments.seeds} seeds, each with rows of its own."
    save_table("search_resnet20", rows_of(groups, "higher", 4, arguments.seeds), note)


if __name__ == "__main__":
    main()
