"""Small models of every shape that the engine must cope with, each with data: `build(name, seed)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


class Branches(nn.Module):
    """Residual joins, a depthwise convolution, two branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 4, 3, stride=2), nn.Conv2d(8, 6, 3, stride=2, padding_mode="reflect")
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.relu(self.depth_norm(self.depth(x))))
        x = torch.cat([self.left(x), F.gelu(self.right(F.pad(x, (0, 0, 0, 0))))], 1)
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One module called twice, and two modules that share a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 8), nn.Linear(8, 8)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.other.weight = self.one.weight
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(F.relu(self.first(x)))))
        return self.last(F.gelu(self.one(x)) - self.other(x))


class Transposed(nn.Module):
    """1-d and transposed convolutions, also grouped and depthwise ones, and a view that wants contiguous memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding="same")
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2)
        self.norm = nn.BatchNorm1d(4)
        self.plane = nn.ConvTranspose2d(4, 6, (1, 3), groups=2)
        self.depth = nn.ConvTranspose2d(6, 6, (1, 2), groups=6)
        self.flat = nn.Conv2d(6, 3, (1, 3))
        self.head = nn.Linear(3 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.up(F.relu(self.conv(x)))))
        x = self.flat(self.depth(F.relu(self.plane(x.unsqueeze(2)))))
        return self.head(F.adaptive_avg_pool2d(x, (1, 16)).view(x.shape[0], -1))


class Tokens(nn.Module):
    """Linear layers on [batch, tokens, channels], a layer norm, a product of activations, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        attention = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5, -1)
        return self.out(self.norm(x + attention @ self.value(x)))


class TimeFirst(nn.Module):
    """Keeps the batch in the second dimension inside, so coalitions cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean(0)


MODELS = {kind.__name__: kind for kind in (Branches, Shared, Transposed, Tokens, TimeFirst)}
SHAPES = {"Branches": (3, 8, 8), "Shared": (6,), "Transposed": (4, 9), "TimeFirst": (4, 4)}


def build(name: str, seed: int, sizes: tuple[int, ...] = (12, 8)) -> tuple[nn.Module, list[tuple[Any, Tensor]]]:
    """A model in eval mode with lived-in BatchNorm statistics, and batches of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[name]()
        data: list[tuple[Any, Tensor]] = []
        for size in sizes:
            if name == "Tokens":
                ids = torch.randint(0, 11, (size, 7), generator=generator)
                data.append((ids, torch.randint(0, CLASSES, (size, 7), generator=generator)))
            else:
                x = torch.randn(size, *SHAPES[name], generator=generator)
                data.append((x, torch.randint(0, CLASSES, (size,), generator=generator)))
        model.train()
        with torch.no_grad():
            for inputs, _ in data:
                model(inputs)
    return model.eval(), data
