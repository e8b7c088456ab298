"""Where the op tests run: SMPQ_TEST_DEVICE is cpu (default), cuda, or emulated (the CUDA kernels on a CPU emulator)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from smpq_ext import ops

settings.register_profile(
    "smpq",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),  # the same cases in every CI run; new ones on a developer's machine
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("smpq")

WHERE = os.environ.get("SMPQ_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    if WHERE == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its newer name
            torch.backends.cudnn.allow_tf32 = False  # the library's products at the accuracy of ours


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)  # hypothesis knows nothing of torch's numbers: its tests draw a seed for theirs


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """The device of the tensors; with `emulated` they are on the CPU and the ops are those of the emulator."""
    if WHERE == "emulated":
        torch.ops.load_library(os.environ["SMPQ_EMULATED_LIBRARY"])
        kernels, ops._smpq = ops._smpq, torch.ops.smpq_emulated
        yield "cpu"
        ops._smpq = kernels
    else:
        yield WHERE


@pytest.fixture
def opcheck() -> Callable[..., object]:
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs it")
    return torch.library.opcheck


@pytest.fixture
def compiled() -> None:
    assert ops.compiled, f"the extension is not built in {Path(ops.__file__).parent}"
