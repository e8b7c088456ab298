"""What `smpq doctor` looks at: versions, the compiled kernels, the GPU, and whether kernel and specification agree."""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import smpq_ext


class Finding(NamedTuple):
    good: bool | None  # None where it is for information only
    name: str
    text: str


def examine() -> Iterator[Finding]:
    """Findings, one after the other; the installation works where none is bad."""
    yield Finding(sys.version_info >= (3, 11), "python", f"{platform.python_version()} (3.11 or newer is needed)")
    yield Finding(None, "smpq_ext", smpq_ext.__version__)
    try:
        import torch
    except Exception as error:
        yield Finding(False, "torch", f"cannot be imported ({error})")
        return
    recent = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    yield Finding(recent, "torch", f"{torch.__version__} (2.10 or newer is needed)")
    try:
        from smpq_ext import _C
    except Exception as error:
        yield Finding(False, "kernels", f"not loaded ({_line(error)}); plain torch is used, many times slower")
        yield Finding(None, "remedy", "in the source folder: pip install --no-build-isolation --no-deps .")
    else:
        built: dict[str, Any] = _C.build_info()
        same = built["torch"].split("+")[0] == torch.__version__.split("+")[0]
        other = "" if same else "; another torch runs here: build again if anything fails"
        text = f"loaded, built for torch {built['torch']} by {built['compiler']}{other}"
        yield Finding(True if same else None, "kernels", text)
        yield Finding(None, "CPU kernels", built["cpu_kernels"])
        cuda = f"{built['cuda']} for {built['cuda_architectures']}" if built["cuda"] else "built without nvcc"
        yield Finding(None, "CUDA kernels", cuda)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        yield Finding(None, "GPU", torch.cuda.get_device_name())
    else:
        yield Finding(None, "GPU", "none is visible")
    for device in devices:
        yield from _check(device)


def _check(device: Any) -> Iterator[Finding]:
    """Fake quantization of a million numbers: bit for bit against the specification, and beside a copy."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the kernels are missing was said
        from smpq_ext import ops, reference
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1024, generator=numbers).to(device)
    scale = (0.01 + torch.rand(3, 1024, generator=numbers)).to(device)
    low, high = (torch.tensor(codes, dtype=torch.int32, device=device) for codes in ((-2, -8, -128), (1, 7, 127)))
    mixtures = torch.eye(3, device=device)
    try:
        single = torch.equal(
            ops.fake_quantize(x, scale[1], bits=4, axis=0),
            reference.fake_quantize(x, scale[1], None, None, None, -8, 7, 0, None),
        )
        several = torch.equal(
            ops.coalition_fake_quantize(x, scale, None, low, high, mixtures, axis=0),
            reference.coalition_fake_quantize(x, scale, None, low, high, mixtures, 0, None),
        )
    except Exception as error:
        yield Finding(False, f"self-check on {device}", f"fails ({_line(error)})")
        return
    same = single and several
    said = "equal their specification bit for bit" if same else "DIFFER from their specification"
    yield Finding(same, f"self-check on {device}", f"the kernels {said}")
    # 24 MiB: past 32 MiB glibc would give freed memory back, and both sides be timed getting pages from the system
    x, scale = x.repeat(6, 1), scale[1].repeat(6)
    copy = _seconds(x.clone, device)  # allocates its output, as the kernel does
    quantize = _seconds(lambda: ops.fake_quantize(x, scale, bits=4, axis=0), device)
    speed = 2 * x.numel() * x.element_size() / quantize / 1e9
    text = f"fake quantization at {speed:.1f} GB/s, {100 * copy / quantize:.0f} % of a copy's bandwidth"
    yield Finding(None, f"speed on {device}", text)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _seconds(function: Callable[[], Any], device: Any) -> float:
    """The fastest of the calls that fit into a fifth of a second."""
    import torch

    best, until = float("inf"), time.perf_counter() + 0.2
    function()
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
