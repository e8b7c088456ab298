"""Freed memory is used again while an evaluator lives, and given back after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("compiled")

SCRIPT = """
import gc, resource
import numpy as np, torch
from torch import nn
import smpq_ext

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Softplus(), nn.Conv2d(32, 32, 3, padding=1), nn.Softplus())
data = [(torch.randn(16, 3, 64, 64), torch.randn(16, 32, 64, 64))]
settings = dict(bits=(2, 8), fixed={}, loss=nn.functional.mse_loss)
before = resident()
ev = smpq_ext.evaluator(model, data, **settings)
rows = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T.astype(np.int8)
ev(rows), ev(rows)
during = []
for _ in range(3):  # the heap may still grow in one of them
    start = faults()
    ev(rows)
    during.append(faults() - start)
print("faults", min(during))
print("used", (resident() - before) // resource.getpagesize())
del ev
gc.collect()
print("left", (resident() - before) // resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_forward_faults_in_no_memory_and_an_evaluator_leaves_none_behind() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    pages = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    assert pages["used"] > 20_000
    assert pages["faults"] < 0.05 * pages["used"]
    assert pages["left"] < 0.5 * pages["used"]


SOAK = """
import json, sys
import torch
from torch import nn
import smpq_ext
from benchmarks.soak import soak
from smpq_ext.store import Recorded, SqliteStore

torch.manual_seed(0)
convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)]
layers = [part for c in convolutions for part in (c, nn.BatchNorm2d(16), nn.ReLU())]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
data = [(torch.randn(16, 3, 16, 16), torch.randint(0, 4, (16,)))]
ev = smpq_ext.evaluator(model, data, bits=(2, 3, 4, 5, 6, 8), fixed={})
print(json.dumps(soak(Recorded(ev, SqliteStore(sys.argv[1])), 2200)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_stays_flat_over_two_thousand_evaluations(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SOAK, str(tmp_path / "evaluations.sqlite")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    warm, *later = (row["resident"] for row in json.loads(done.stdout))
    assert len(later) == 10
    assert max(later) < 1.05 * warm
