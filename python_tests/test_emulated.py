"""The CUDA kernels without a GPU: compiled by g++ on emulator/cuda_emulator.h, under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
EMULATOR = TESTS / "emulator"
BUILD = ROOT / "build" / "emulated"

SOUND = ("reverse", "rotate_in_warp")
FAULTS = {
    "missing_barrier": "wrong result",
    "write_out_of_bounds": "heap-buffer-overflow",
    "read_out_of_bounds": "heap-buffer-overflow",
    "shared_out_of_bounds": "heap-buffer-overflow",
    "stack_out_of_bounds": "insufficient space|stack-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "signed_overflow": "signed integer overflow",
    "shift_too_far": "shift exponent",
    "float_to_int_overflow": "outside the range",
    "exit_before_barrier": "barrier divergence: thread 77 has ended",
    "different_barriers": "barrier divergence",
    "exit_before_shuffle": "a lane of the mask has ended",
    "shuffle_against_barrier": "a lane of the mask waits elsewhere",
    "different_masks": "lanes name different masks",
    "source_outside_mask": "shuffle from a lane that is not in the mask",
    "too_much_shared_memory": "invalid configuration argument",
}


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, errors="replace", check=False
    )


def sanitized(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Without address randomization where that may be: where the kernel draws 32 bits, GCC 12's sanitizer may crash."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") and run(["setarch", "-R", "true"]).returncode == 0 else []
    # `env` behind it, so that setarch itself runs without what is preloaded
    return run([*fixed, "env", *(f"{name}={value}" for name, value in environment.items()), *command])


def built(command: list[str | Path], **environment: str) -> None:
    done = run(command, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


def sanitizer_runtime() -> str:
    """What to preload into a Python that was not linked with the sanitizers; libstdc++ for exceptions."""
    names = ("libasan.so", "libstdc++.so")
    libraries = [run([tool("g++"), f"-print-file-name={name}"]).stdout.strip() for name in names]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no AddressSanitizer runtime")
    return " ".join(libraries)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="only Linux on x86-64"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    configure = [tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    # The compiler by CXX: CMake heeds it the first time only, where a changed -D would empty its cache.
    built([*configure, "-DSMPQ_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}"], CXX=tool("g++"))
    built([tool("cmake"), "--build", BUILD])
    return BUILD / "libsmpq_emulated.so"


@pytest.fixture(scope="module")
def faults(library: Path) -> Path:
    return library.with_name("faults")


@pytest.mark.parametrize("kernel", SOUND)
def test_sound_kernels_run(faults: Path, kernel: str) -> None:
    done = sanitized([faults, kernel])
    assert (done.returncode, done.stdout) == (0, "right result\n"), done.stderr


@pytest.mark.parametrize(("kernel", "report"), FAULTS.items(), ids=FAULTS)
def test_faults_are_reported(faults: Path, kernel: str, report: str) -> None:
    done = sanitized([faults, kernel])
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize(
    "file",
    [EMULATOR / "paths.py", EMULATOR / "engine.py", TESTS / "test_ops.py", TESTS / "test_fused_ops.py"],
    ids=lambda f: f.stem,
)
def test_kernels(library: Path, file: Path) -> None:
    done = sanitized(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not on_the_cpu", file],
        LD_PRELOAD=sanitizer_runtime(),
        ASAN_OPTIONS="detect_leaks=0",  # Python leaks at exit
        SMPQ_TEST_DEVICE="emulated",
        SMPQ_EMULATED_LIBRARY=str(library),
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-20000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
