"""The benchmark models hold the trained weights rightly: they reach the float results that the data folder states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks import data, models

needs_data = pytest.mark.skipif(data.data_folder() is None, reason="no data folder: set SMPQ_DATA")


@needs_data
@pytest.mark.parametrize(
    ("load", "pixels", "expected"),
    [
        (models.load_resnet20, data.RESNET20, 0.915),
        (models.load_resnet20_option_b, data.RESNET20_OPTION_B, 0.919),
    ],
)
def test_resnet20_on_the_lossless_images(load: Callable[[], nn.Module], pixels: data.Pixels, expected: float) -> None:
    accuracy = models.accuracy(load(), data.cifar10_lossless("test", pixels))
    assert accuracy == pytest.approx(expected, abs=0.002)


@needs_data
def test_resnet20_on_jpeg_images() -> None:
    inputs, targets = data.cifar10("test")
    assert inputs.shape == (10_000, 3, 32, 32)
    accuracy = models.accuracy(models.load_resnet20_jpeg(), (inputs[::10], targets[::10]))
    assert accuracy == pytest.approx(0.878, abs=0.02)  # two standard errors of a tenth of the images


@needs_data
@pytest.mark.slow
def test_resnet20_on_all_jpeg_images() -> None:
    assert models.accuracy(models.load_resnet20_jpeg(), data.cifar10("test")) == pytest.approx(0.878, abs=0.0005)


@needs_data
def test_kept_out_images() -> None:
    inputs, targets = data.cifar10_kept_out()
    assert inputs.shape == (5_000, 3, 32, 32)
    assert targets.bincount().min() > 400


@needs_data
@pytest.mark.parametrize(("step", "tolerance"), [(10, 0.1), pytest.param(1, 0.002, marks=pytest.mark.slow)])
def test_mobilenet(step: int, tolerance: float) -> None:
    accuracy = models.accuracy(models.load_mobilenet(), data.imagenet_sample(step), batch=50)
    assert accuracy == pytest.approx(0.591, abs=tolerance)


@needs_data
@pytest.mark.parametrize(
    ("last", "tokens", "expected"),
    [(1950, 512, 1.5305), (1949, 192, 1.474)],  # the README's set and that of the experiment in the specs
)
def test_llama(last: int, tokens: int, expected: float) -> None:
    assert models.nll(models.load_llama(), data.stories(1800, last, tokens)) == pytest.approx(expected, abs=0.0005)


@needs_data
def test_experiment_stories() -> None:
    assert [len(targets) for _, targets in data.experiment_stories()] == [38, 149]


@needs_data
def test_stories_are_shifted_and_padded() -> None:
    inputs, targets = data.stories(0, 20, 192)
    assert inputs.shape == targets.shape == (20, 191)
    assert (inputs[:, 0] == 1).all()
    real = targets != data.IGNORED
    assert torch.equal(inputs[:, 1:][real[:, :-1]], targets[:, :-1][real[:, :-1]])
    assert (real[:, :-1] >= real[:, 1:]).all()  # padding comes last


def test_llama_has_35_layers_and_a_tied_output() -> None:
    model = models.Llama()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 36
    assert model.output.weight is model.tok_embeddings.weight


def test_llama_sees_only_the_past() -> None:
    torch.manual_seed(0)
    model = models.Llama().eval()
    ids = torch.randint(512, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :12], model(ids[:, :12]))


def test_vit_is_the_same_every_time() -> None:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = models.random_vit()(x)
        assert out.shape == (2, 10)
        assert torch.equal(out, models.random_vit()(x))


@pytest.mark.parametrize("folder", ["", "/nowhere"])
def test_missing_data_is_told(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("SMPQ_DATA", folder)
    with pytest.raises(FileNotFoundError, match="SMPQ_DATA"):
        data.stories(0, 1)
