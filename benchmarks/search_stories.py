"""stories260K, weights only: NLL per token on stories 1800-1948 of every method's plan, at equal average widths.

35 linear layers from {2, 3, 4, 6, 8} bits per output channel, output (tied to the embedding) at 8; searched on the
NLL of 38 stories of 192 tokens.

    python -m benchmarks.search_stories [--seeds 3] [--budgets 2.5 3] [--methods ...]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import comparison, data, models
from benchmarks.comparison import Judge

NAME = "search_stories"
EVALUATIONS = 1340


def judge_nll(inputs: torch.Tensor, targets: torch.Tensor, batch: int = 50) -> Judge:
    """NLL per token of each story, weighted so that the mean over stories is the mean over tokens."""

    def judge(model: nn.Module) -> NDArray[np.float64]:
        total, count = [], []
        with torch.inference_mode():
            for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
                loss = nn.functional.cross_entropy(
                    model(x).flatten(0, 1), y.flatten(), reduction="none", ignore_index=data.IGNORED
                )
                total.append(loss.view(y.shape).sum(1))
                count.append((y != data.IGNORED).sum(1))
        tokens = torch.cat(count).double()
        return (torch.cat(total).double() / tokens.mean()).numpy()

    return judge


def tasks(seeds: int, budgets: list[float], batch: tuple[torch.Tensor, torch.Tensor]) -> Iterator[comparison.Task]:
    """All seeds search on the same stories."""
    for seed in range(seeds):
        for budget in budgets:
            settings = {
                "bits": (2, 3, 4, 6, 8),
                "activation_bits": (),
                "fixed": {"output": 8},
                "budget": f"weight-bits={budget:g}",
                "seed": seed,
                "evaluations": EVALUATIONS,
            }
            yield comparison.Task(f"{budget:g} bits", f"{budget:g}-{seed}", [batch], settings)


def main() -> None:
    given = comparison.arguments(__doc__, NAME, (2.5, 3))
    searched, test = data.experiment_stories()
    found = tasks(given.seeds, given.budgets, searched)
    note = f"{__doc__}\n{given.seeds} seeds."
    comparison.run(NAME, note, given, models.load_llama(), judge_nll(*test), found, better="lower", digits=3)


if __name__ == "__main__":
    main()
