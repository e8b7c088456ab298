"""ResNet-20 on CIFAR-10 (JPEG): top-1 of every method's plan on the 10,000 test images, at equal average widths.

Weights and activations from {2, 3, 4, 6, 8} bits, first and last layer at 8; KL to the float model on 512 of the 5,000
training rows kept out of its fine-tuning. BatchNorm statistics kept, or re-estimated for every assignment.

    python -m benchmarks.search_resnet20 [--seeds 3] [--budgets 2.5 3 4] [--methods ...]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks import comparison, data, models

NAME = "search_resnet20"
MODES = {"kept": False, "re-estimated": True}
SAMPLES = 512
EVALUATIONS = 1000


def tasks(seeds: int, budgets: list[float]) -> Iterator[comparison.Task]:
    """Every seed has calibration rows of its own."""
    images, labels = data.cifar10_kept_out()
    for seed in range(seeds):
        rows = np.sort(np.random.default_rng([7, seed]).permutation(len(images))[:SAMPLES])
        for mode, renormalize in MODES.items():
            for budget in budgets:
                settings = {
                    "bits": (2, 3, 4, 6, 8),
                    "budget": f"weight-bits={budget:g},activation-bits={budget:g}",
                    "loss": "kl",
                    "renormalize": renormalize,
                    "seed": seed,
                    "evaluations": EVALUATIONS,
                }
                batches = [(images[rows], labels[rows])]
                yield comparison.Task(f"{mode}, {budget:g} bits", f"{mode}-{budget:g}-{seed}", batches, settings)


def main() -> None:
    given = comparison.arguments(__doc__, NAME, (2.5, 3, 4), [m for m in comparison.METHODS if m != "local"])
    judge = comparison.judge_accuracy(*data.cifar10("test"))
    note = f"{__doc__}\n{given.seeds} seeds."
    found = tasks(given.seeds, given.budgets)
    comparison.run(NAME, note, given, models.load_resnet20_jpeg(), judge, found, better="higher", digits=4)


if __name__ == "__main__":
    main()
