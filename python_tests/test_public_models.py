"""Models that users have, as torchvision builds them: every layer is found, and values are those of a plain loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import smpq_ext
from python_tests.plain_loop import oracle, random_assignments, random_mixtures

pytestmark = [pytest.mark.usefixtures("compiled"), pytest.mark.slow]
# Residual blocks; depthwise convolutions; split, shuffle and concatenation; gates; attention; every layer concatenated.
NAMES = (
    "resnet18",
    "mobilenet_v2",
    "shufflenet_v2_x0_5",
    "mobilenet_v3_small",
    "convnext_tiny",
    "swin_t",
    "squeezenet1_1",
)


@pytest.fixture(scope="module")
def models() -> Any:
    try:
        from torchvision import models
    except ImportError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:  # its wheel is for another build of torch, and its own ops do not load: the models need none
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.library, "register_fake", lambda name: lambda function: function)
            from torchvision import models
    return models


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_a_plain_loop(models: Any, name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=10)
    data = [(torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,)))]
    with torch.no_grad():
        model.train()(data[0][0])  # statistics that are not those of a new model
    ev = smpq_ext.evaluator(model.eval(), data, bits=(4, 8), activation_bits=(6, 8), renormalize=False, fixed={})
    assert ev._executor.lockstep is not None, ev.notes
    assert bool(ev.left_out) == (name == "swin_t"), (
        ev.left_out
    )  # its attention calls functions with its layers' weights
    rows = np.concatenate([ev.space.one_hot(random_assignments(ev, 2)), random_mixtures(ev, 1)])
    rows[-1] /= np.maximum(rows[-1].sum(1, keepdims=True), 0.1)
    expected = np.array([oracle(ev, row) for row in rows])
    # Ties that go the other way in some 50 layers.
    np.testing.assert_allclose(ev(rows), expected, rtol=5e-3)
