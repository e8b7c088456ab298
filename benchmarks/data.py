"""The real data of the benchmarks, read from the folder that SMPQ_DATA names; the project itself ships none.

Images come as float32 [n, 3, height, width], labels and token ids as int64.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smpq_ext.engine.losses import IGNORED

Samples = tuple[Tensor, Tensor]  # inputs, targets


@dataclass(frozen=True)
class Pixels:
    """How a model wants its pixels: (x / 255 - mean) / std, per colour."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [n, height, width, 3] to float32 [n, 3, height, width]."""
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255  # the array may be a read-only map
        mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (self.mean, self.std))
        return ((x - mean) / std).contiguous()


RESNET20 = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RESNET20_OPTION_B = Pixels((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
MOBILENET = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # x / 127.5 - 1


def data_folder() -> Path | None:
    """The folder SMPQ_DATA, by default ../shared/data beside the repository; None, to skip visibly, without one.

    Raises FileNotFoundError where SMPQ_DATA names a folder that is not there; an empty SMPQ_DATA means no data.
    """
    named = os.environ.get("SMPQ_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if named and not folder.is_dir():
        raise FileNotFoundError(f"SMPQ_DATA: {named} is not a folder")
    return folder if named != "" and folder.is_dir() else None


def data_file(*parts: str) -> Path:
    """A file of the data folder. Raises FileNotFoundError where there is no such folder."""
    folder = data_folder()
    if folder is None:
        raise FileNotFoundError("no data folder: set SMPQ_DATA")
    return folder.joinpath(*parts)


def cifar10(split: str, pixels: Pixels = RESNET20) -> Samples:
    """The CIFAR-10 images at JPEG quality 75; split "train" (50,000) or "test" (10,000)."""
    images, labels = _jpegs(data_file("cifar10", f"cifar10_jpeg75_{split}.npz"))
    return pixels(images), torch.from_numpy(labels)


def cifar10_kept_out(pixels: Pixels = RESNET20) -> Samples:
    """The 5,000 JPEG training images that the fine-tuning of resnet20_jpegft never saw: for calibration and search."""
    images, labels = _jpegs(data_file("cifar10", "cifar10_jpeg75_train.npz"))
    rows = np.random.RandomState(0).permutation(50_000)[:5_000]
    return pixels(images[rows]), torch.from_numpy(labels[rows])


def cifar10_lossless(split: str, pixels: Pixels = RESNET20) -> Samples:
    """Lossless CIFAR-10 images; split "train" (4,000) or "test" (1,000)."""
    with np.load(data_file("cifar10", "cifar10_lossless_5k.npz")) as arrays:
        return pixels(arrays[f"x_{split}"]), torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))


def imagenet_sample(step: int = 1) -> Samples:
    """Every step-th of 1,000 ImageNet images, one per class, 224 px, for MobileNet. To compare with, not to quote."""
    images, labels = _jpegs(data_file("imagenet_sample", "imagenet_sample1000_224_q95.npz"))
    return MOBILENET(images[::step]), torch.from_numpy(labels[::step])


def stories(first: int, last: int, tokens: int = 512, step: int = 1) -> Samples:
    """Every step-th of stories first to last - 1 of TinyStories, the first `tokens` ids of each, starting with BOS.

    Inputs [stories, length] and the next ids as targets [stories, length], IGNORED past the end of a story, where
    length is at most tokens - 1: the last id is only a target.
    """
    with np.load(data_file("stories260k", "tinystories_ids.npz")) as arrays:
        rows = np.split(arrays["ids"].astype(np.int64), np.cumsum(arrays["length"])[:-1])[first:last:step]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(row[:tokens]) for row in rows], batch_first=True, padding_value=IGNORED
    )
    return ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()


def experiment_stories() -> tuple[Samples, Samples]:
    """38 stories to search on and 149 others to test on, 192 ids each, as many as in the experiment of the specs.

    The search set is spread over the file: neighbouring stories are alike, the first 38 far easier than the rest.
    """
    return stories(0, 1800, 192, step=48), stories(1800, 1949, 192)


def batches(samples: Samples, size: int) -> list[Samples]:
    """The samples cut into batches, as evaluators and searches take them."""
    return list(zip(samples[0].split(size), samples[1].split(size), strict=True))


def _jpegs(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Decoded images [n, height, width, 3], kept in a cache, and labels of a file with `blob`, `length` and `y`."""
    with np.load(path) as arrays:
        labels = arrays["y"].astype(np.int64)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smpq_ext"
        cached = folder / f"{path.stem}-{digest}.npy"
        if not cached.exists():
            ends = np.cumsum(arrays["length"], dtype=np.int64)
            files = np.split(arrays["blob"], ends[:-1])
            images = np.stack([np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB")) for file in files])
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{cached.stem}.{os.getpid()}.npy"
            np.save(temporary, images)
            temporary.replace(cached)
    return np.load(cached, mmap_mode="r"), labels
