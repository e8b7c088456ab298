"""The networks of the benchmarks in plain torch, and their trained weights from the data folder."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import IGNORED, Samples, batches, data_file

Model = TypeVar("Model", bound=nn.Module)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second pixel, and zeros for the new channels."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 and option == "A":
            self.downsample = PadShortcut(outputs - inputs)
        elif stride != 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class ResNet20(nn.Module):
    """CIFAR ResNet-20; its last layer is called `linear` with option-A shortcuts and `fc` with option B, as published.

    x: [n, 3, 32, 32]; returns logits [n, 10].
    """

    def __init__(self, option: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, option)
        self.layer2 = self._stage(16, 32, option)
        self.layer3 = self._stage(32, 64, option)
        self.head = "linear" if option == "A" else "fc"
        self.add_module(self.head, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(x.mean((2, 3)))

    @staticmethod
    def _stage(inputs: int, outputs: int, option: str) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, outputs // inputs, option)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, option) for _ in range(2)))


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU6; a stride of 2 pads on the right and below only, as TensorFlow does."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(self.pad(x))))


class MobileNetV1(nn.Module):
    """MobileNet v1 of width 0.25 (Howard et al. 2017). x: [n, 3, 224, 224]; returns logits [n, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256]
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=ConvNorm(3, 8, 3, stride=2))
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers[f"dw{i}"] = ConvNorm(inputs, inputs, 3, stride=2 if i in (2, 4, 6, 12) else 1, groups=inputs)
            layers[f"pw{i}"] = ConvNorm(inputs, outputs, 1)
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs. x: [n, heads, tokens, size]; cos, sin: [tokens, size / 2]."""
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size, self.repeats = dim // heads, heads // kv_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden)
        self.attention_norm = RMSNorm(dim)
        self.ffn_norm = RMSNorm(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The decoder of stories260K: 7 linear layers per block, and an output tied to the embedding.

    ids: int64 [n, tokens], at most 512 tokens; returns logits [n, tokens, vocabulary].
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        layers: int = 5,
        dim: int = 64,
        heads: int = 8,
        kv_heads: int = 4,
        hidden: int = 172,
        vocabulary: int = 512,
    ) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, vocabulary, bias=False)
        self.output.weight = self.tok_embeddings.weight
        size = dim // heads
        angles = torch.outer(torch.arange(512), 10_000 ** -(torch.arange(0, size, 2) / size))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.output(self.norm(x))


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer that pools by the mean. x: [n, 3, size, size]; returns logits [n, 10]."""

    def __init__(self, dim: int = 96, layers: int = 4, heads: int = 4, patch: int = 4, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, dim))
        self.layers = nn.Sequential(*(ViTBlock(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(x)).mean(1))


def load_resnet20() -> ResNet20:
    """ResNet-20 as published (akamaster), 91.5 % on the lossless test images; pixels as `data.RESNET20`."""
    return _load(ResNet20("A"), "resnet20", "resnet20-12fca82f.safetensors")


def load_resnet20_jpeg() -> ResNet20:
    """The same, fine-tuned on JPEG images: 87.8 % on the 10,000 JPEG test images; pixels as `data.RESNET20`."""
    return _load(ResNet20("A"), "resnet20", "resnet20_jpegft.safetensors")


def load_resnet20_option_b() -> ResNet20:
    """The float model that BSQ starts from, 1x1-conv shortcuts: 91.9 %; pixels as `data.RESNET20_OPTION_B`."""
    return _load(ResNet20("B"), "resnet20", "bsq_resnet20_optB.safetensors")


def load_mobilenet() -> MobileNetV1:
    """MobileNet v1 0.25: 59.1 % on the ImageNet sample."""
    return _load(MobileNetV1(), "mobilenet_v1_025", "mobilenet_v1_0.25_224.safetensors")


def load_llama() -> Llama:
    """stories260K (llama2.c)."""
    return _load(Llama(), "stories260k", "stories260K.safetensors")


def resnet50() -> nn.Module:
    """torchvision's, with random weights. x: [n, 3, 224, 224]; returns logits [n, 1000]."""
    from torchvision.models import resnet50 as make

    return make(weights=None).eval()


def random_vit(seed: int = 0) -> ViT:
    """A ViT with random weights: needs no data folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT().eval()


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples, batch: int = 250) -> float:
    """The share of samples whose largest logit is that of their class."""
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(samples, batch)) / len(samples[1])


@torch.no_grad()
def nll(model: nn.Module, samples: Samples, batch: int = 50) -> float:
    """Mean cross-entropy per token that is not IGNORED, in nats."""
    total = 0.0
    for ids, targets in batches(samples, batch):
        total += float(F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / int((samples[1] != IGNORED).sum())


def _load(model: Model, *parts: str) -> Model:
    """The model in eval mode with the weights of a safetensors file, every parameter accounted for."""
    state = load_file(data_file(*parts))
    if isinstance(model, Llama):
        state["output.weight"] = state["tok_embeddings.weight"]
    expected = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or expected & set(missing):
        raise ValueError(f"{parts[-1]}: unexpected {unexpected}, missing {sorted(expected & set(missing))}")
    return model.eval()
