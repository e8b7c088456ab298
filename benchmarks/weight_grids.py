"""Whether weight grids should use the code -2^(b-1): the loss of every layer at one width, with it and without.

ResNet-20: weights and activations, KL to the float model on 512 images kept out of its training, inputs after ReLU.
stories260K: weights only, NLL per token of 149 unseen stories, inputs after RMSNorm. The library
uses the code up to 4 bits where inputs have both signs.

    python -m benchmarks.weight_grids
"""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np

import smpq_ext
from benchmarks import data, models
from benchmarks.environment import save_table
from smpq_ext.engine import grids

BITS = (2, 3, 4, 6)


def losses(lowest_code: bool, **settings: Any) -> list[float]:
    """The loss with all slots at each of BITS, by grids with or without the lowest code."""

    weight_grids = grids.weight_grids

    def made(weight: Any, axis: int, widths: Any, calibrate: Any, both_signs: bool) -> Any:
        return weight_grids(weight, axis, widths, calibrate, lowest_code)

    with mock.patch.object(grids, "weight_grids", made):
        value = smpq_ext.evaluator(bits=BITS, **settings)
    rows = np.repeat(np.arange(len(BITS), dtype=np.int8)[:, None], len(value.slots), axis=1)
    return (-value(rows)).tolist()


def main() -> None:
    images, labels = data.cifar10_kept_out()
    resnet = partial(losses, model=models.load_resnet20_jpeg(), data=[(images[:512], labels[:512])], loss="kl")
    _, test = data.experiment_stories()
    llama = partial(losses, model=models.load_llama(), data=[test], activation_bits=(), fixed={"output": 8})
    sides = {
        "ResNet-20, statistics kept": partial(resnet, renormalize=False),
        "ResNet-20, statistics re-estimated": partial(resnet, renormalize=True),
        "stories260K": llama,
    }
    rows = []
    for name, side in sides.items():
        for bits, used, left_out in zip(BITS, side(True), side(False), strict=True):
            rows.append({"model": name, "bits": bits, "with -2^(b-1)": used, "without": left_out})
    save_table("weight_grids", rows, __doc__)


if __name__ == "__main__":
    main()
