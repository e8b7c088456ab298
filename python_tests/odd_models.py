"""Models that a captured graph could get wrong, each with its data: `MODELS[name]()` gives both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[nn.Module, list[tuple[Any, Tensor]]]


class Function(nn.Module):
    """Layers a, b, ... and a function of (self, *inputs)."""

    def __init__(self, function: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in zip("abcdefg", layers, strict=False):
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def planes(*sizes: int, count: int = 16, channels: int = 3) -> list[tuple[Any, Tensor]]:
    return [(torch.randn(count, channels, n, n), torch.randint(0, 4, (count,))) for n in sizes]


def vectors(count: int = 16, sets: int = 1) -> list[tuple[Any, Tensor]]:
    return [(torch.randn(count, 6), torch.randint(0, 4, (count,))) for _ in range(sets)]


def other_sizes() -> Case:
    """A size of the images that the graph would keep."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.interpolate(self.a(x), size=x.shape[2] // 2)
        return self.b(F.relu(y)).mean((2, 3))

    return Function(forward, nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)), planes(8, 12)


def optional_input() -> Case:
    """An input that only some batches give."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.a(x)
        return self.b(F.relu(y if mask is None else y * mask))

    (x, y), (x2, y2) = vectors(sets=2)
    mask = (torch.rand(16, 6) > 0.5).float()
    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 4)), [((x,), y), ((x2, mask), y2)]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, p: Tensor, q: Tensor) -> Tensor:
        return self.c(F.relu(self.a(p) - 2 * self.b(q)))


def named_inputs() -> Case:
    """Inputs by name, in another order in the second batch."""
    (p, y), (q, _) = vectors(sets=2)
    return Named(), [({"p": p, "q": q}, y), ({"q": p, "p": q}, y)]


def last_token() -> Case:
    """A token picked by the number of its sample."""

    def forward(self: Any, x: Tensor, length: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))[torch.arange(x.shape[0]), length])

    x, length = torch.randn(16, 5, 6), torch.randint(0, 5, (16,))
    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 4)), [((x, length), torch.randint(0, 4, (16,)))]


def class_token() -> Case:
    """A learnt token before those of every sample, and its position."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1) + self.position
        return self.b(F.gelu(y)[:, 0] + F.gelu(y).mean(1))

    model = Function(forward, nn.Linear(6, 6), nn.Linear(6, 4))
    model.token, model.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 6, 6))
    return model, [(torch.randn(16, 5, 6), torch.randint(0, 4, (16,)))]


def read_twice() -> Case:
    """What a layer reads is read by something else between the layer and its ReLU."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.b(x)
        gate = torch.sigmoid(x)
        return self.c(F.relu(y) * gate).mean((2, 3))

    return Function(forward, *(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)), nn.Conv2d(3, 4, 1)), planes(6)


def input_read_late() -> Case:
    """The same for the model's input."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        pooled = F.avg_pool2d(x, 2)
        return self.b(F.max_pool2d(F.relu(y), 2) + pooled).mean((2, 3))

    return Function(forward, nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)), planes(6)


def norm_of_vectors() -> Case:
    """BatchNorm1d after a Linear layer, and no clamp behind it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(self.a(x))))

    return Function(forward, nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), vectors()


def reflected() -> Case:
    """Padding with something else than zeros."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))).flatten(1).unflatten(1, (4, -1)).mean(2)

    return Function(forward, nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.Conv2d(6, 4, 1)), planes(6)


def output_size() -> Case:
    """A transposed convolution that is told its output's size."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x, output_size=(12, 12))
        return self.b(F.relu(y)).flatten(2).mean(2)

    return Function(forward, nn.ConvTranspose2d(3, 6, 3, 2, 1), nn.Conv2d(6, 4, 1)), planes(6)


def integer_sum() -> Case:
    """A sum of a layer's output and integers."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) + (x > 0).long())).mean((2, 3))

    return Function(forward, nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)), planes(6)


def input_without_samples() -> Case:
    """An input that all samples share."""

    def forward(self: Any, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) * scale.exp()))

    data = [((x, torch.tensor([0.3])), y) for x, y in vectors()]
    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 4)), data


def returned_size() -> Case:
    """The number of samples among the outputs."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, int]:
        return self.b(F.relu(self.a(x))), x.shape[0]

    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 4)), vectors()


class NormAct(nn.BatchNorm2d):
    """A BatchNorm that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def norm_with_activation() -> Case:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))).mean((2, 3))

    return Function(forward, nn.Conv2d(3, 6, 3, padding=1), NormAct(6), nn.Conv2d(6, 4, 1)), planes(6)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


def residual_blocks() -> Case:
    """Blocks as in ResNet."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(F.relu(self.a(x)))).mean((2, 3)))

    return Function(forward, nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8), nn.Linear(8, 4)), planes(6)


def other_layouts() -> Case:
    """A convolution straight into a linear layer, and back."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))

    return Function(forward, nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6), nn.Conv2d(6, 4, 1)), planes(6)


def squeeze_and_excite() -> Case:
    """Values of one pixel, whose channels are first and last at once."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.c(F.relu(self.b(x.mean((2, 3), keepdim=True)))))
        return self.d(F.relu(self.a(x[:, :3]) + x.mean((2, 3), keepdim=True))).mean((2, 3))

    layers = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
    return Function(forward, *layers), planes(6)


def normed_shortcut() -> Case:
    """A sum of two normalized convolutions, as where a ResNet grows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.f(F.relu(self.c(self.b(x)) + self.e(self.d(x))).mean((2, 3)))

    first, second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2, 1), first, nn.Conv2d(4, 8, 1, 2), second, nn.Linear(8, 4)
    return Function(forward, *layers), planes(8)


def grouped() -> Case:
    """Groups that fill no block of 16 channels, some, or many."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))))
        return self.f(F.relu(self.e(x)).mean((2, 3)))

    sizes = (3, 12, 3, 3), (12, 24, 3, 3), (24, 32, 1, 8), (32, 64, 3, 2), (64, 64, 3, 32)
    convolutions = (nn.Conv2d(i, o, k, padding=k // 2, groups=g) for i, o, k, g in sizes)
    return Function(forward, *convolutions, nn.Linear(64, 4)), planes(6)


def gated() -> Case:
    """Activations other than ReLU, factors, and a sum of branches with choices of their own, as in language models."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.c(F.silu(self.a(x)) * self.b(x))
        x = F.gelu(self.d(x), approximate="tanh") + self.e(F.hardswish(self.f(x)))
        return self.g(F.gelu(x)).mean(1)

    sizes = (6, 8), (6, 8), (8, 6), (6, 5), (4, 5), (6, 4), (5, 4)
    tokens = [(torch.randn(9, 3, 6), torch.randint(0, 4, (9,))) for _ in range(2)]
    return Function(forward, *(nn.Linear(*size) for size in sizes)), tokens


def weight_used_elsewhere() -> Case:
    """A weight that the model also multiplies by itself: that product would not be quantized."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.c(F.linear(F.relu(self.b(F.relu(self.a(x)))), self.b.weight.t()))

    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(6, 4)), vectors()


def padded_outside() -> Case:
    """Zeros on some sides, put there by the model itself, as "same" padding in TensorFlow; and other numbers than 0."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.pad(x, (0, 1, 2, 1))))
        x = F.relu(self.b(F.pad(x, (0, 1, 0, 1))))
        y = F.pad(x, (1, 1, 1, 1))
        x = self.c(y) + self.d(y) + self.e(F.pad(x, (1, 1, 1, 1), value=0.5))
        return x.mean((2, 3))

    layers = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2, 1, groups=4), *(nn.Conv2d(4, 4, 2) for _ in range(3))
    return Function(forward, *layers), planes(8)


def huge_sums() -> Case:
    """Sums of products beyond 32 bits."""
    model = nn.Sequential(nn.Linear(100_000, 4))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
    return model, [(torch.rand(16, 100_000) + 1, torch.randint(0, 4, (16,)))]


MODELS: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        *(other_sizes, optional_input, named_inputs, last_token, class_token, read_twice, input_read_late),
        *(norm_of_vectors, reflected, output_size, integer_sum, input_without_samples, returned_size),
        *(norm_with_activation, residual_blocks, huge_sums, other_layouts, squeeze_and_excite, normed_shortcut),
        *(grouped, gated, weight_used_elsewhere, padded_outside),
    )
}
FALL_BACK = {  # and what the note says
    "other_sizes": "batches differ",
    "optional_input": "batches differ",
    "last_token": "by their number",
    "reflected": "does more than multiply",
    "output_size": "does more than multiply",
    "input_without_samples": "input without samples",
    "returned_size": "returns a size",
}


def build(name: str) -> Case:
    """The model in eval mode, with lived-in BatchNorm statistics."""
    torch.manual_seed(0)
    model, data = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
    return model.eval(), data
