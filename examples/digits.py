"""Trains a small network on scikit-learn's handwritten digits and finds its bits, 3 on average.

    python examples/digits.py

The command line does the same search with:

    smpq search --model examples/digits.py:model --data examples/digits.py:data --budget weight-bits=3,activation-bits=3
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import smpq_ext
from smpq_ext.report import page, tables

Samples = tuple[Tensor, Tensor]

BUDGET = "weight-bits=3,activation-bits=3"
OUT = Path("demo_out")


class Block(nn.Module):
    """A depthwise and a pointwise convolution beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(x + self.norm2(self.pointwise(y)))


class DigitNet(nn.Module):
    """x: [n, 1, 8, 8]; returns logits [n, 10]."""

    def __init__(self, narrow: int = 12, wide: int = 48, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, narrow, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(narrow)
        self.stage1 = nn.Sequential(*(Block(narrow) for _ in range(blocks)))
        self.down = nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(wide)
        self.stage2 = nn.Sequential(*(Block(wide) for _ in range(blocks)))
        self.head = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(F.relu(self.stem_norm(self.stem(x))))
        x = self.stage2(F.relu(self.down_norm(self.down(x))))
        return self.head(x.mean((2, 3)))


def digits(part: str) -> Samples:
    """The images in [0, 1] and their classes: 1,297 to "train" on, 500 "held-out"."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    chosen = order[:1297] if part == "train" else order[1297:]
    x = torch.from_numpy(images[chosen] / 16).float().reshape(-1, 1, 8, 8)
    return x, torch.from_numpy(labels[chosen]).long()


def data() -> list[Samples]:
    """Calibration data: the training images, in one batch."""
    return [digits("train")]


def model(epochs: int = 25) -> nn.Module:
    """The trained network; every call trains the same one, in seconds."""
    x, y = digits("train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network gains nothing from more, and sums do not depend on how many there are
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitNet()
        steps = -(-len(x) // 64)
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                down, right = torch.randint(-1, 2, (2,)).tolist()
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch].roll((down, right), (2, 3))), y[batch]).backward()
                optimizer.step()
                schedule.step()
    torch.set_num_threads(threads)
    return net.eval()


@torch.no_grad()
def evaluate(net: nn.Module, samples: Samples) -> tuple[float, float]:
    """Mean cross-entropy, and the share of samples whose largest logit is that of their class."""
    x, y = samples
    logits = net(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def main() -> None:
    start = time.perf_counter()
    net = model()
    print(f"trained in {time.perf_counter() - start:.1f} s")
    OUT.mkdir(exist_ok=True)
    store = OUT / "evaluations.sqlite"
    uniform = smpq_ext.search(net, data(), budget=BUDGET, method="uniform", store=store)
    found = smpq_ext.search(net, data(), budget=BUDGET, method="shapley", store=store, progress=True)
    found.save(OUT)
    path = page.write(found, OUT)

    nets = {
        "float": (net, found.float_loss),
        "uniform, 3 bits": (smpq_ext.apply(net, uniform.plan), uniform.measured_loss),
        "plan, 3 bits on average": (smpq_ext.apply(net, found.plan), found.measured_loss),
    }
    rows = []
    for name, (candidate, calibration_loss) in nets.items():
        loss, accuracy = evaluate(candidate, digits("held-out"))
        rows.append((name, f"{calibration_loss:.4f}", f"{loss:.4f}", f"{100 * accuracy:.1f} %"))
    print(tables.layers(found).text())
    print(f"\n{found.finding}\n")
    print(tables.Table(("digits", "calibration loss", "held-out loss", "held-out accuracy"), tuple(rows)).text())
    print(f"\n{time.perf_counter() - start:.0f} s in all; report: {path}")


if __name__ == "__main__":
    main()
