"""What a GPU does, one JSON and one table: benchmarks/results/gpu.json and .md.

"copy" and "product": what a copy of 2 GiB and a product of two bfloat16 matrices of 8,192 x 8,192 reach here. Ops:
"µs" of a call inside a CUDA graph, on operands that fit no cache, and launched one by one; "of copy": the share of a
copy's bandwidth for the bytes that must be moved; "vs B2": torch's own ops, "vs B3": clamp(round) under torch.compile,
"vs B7": a Triton kernel, "vs empty": a kernel that does nothing. Coalitions: chains, random rows and mixtures as in
engine.md, random weights; "vs B4": a bank of weights at all widths, "vs B6": the bank under torch.compile in a CUDA
graph, "vs no replay": ours without CUDA graphs; "our kernels", "others", "idle": shares of the time; "of bf16 rate":
products a second after sharing, by those of the matrix product. Medians by events, all sides in turn.

    python -m benchmarks.gpu [--only ops|engine]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.environment import save_table
from benchmarks.gpu import engine, ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ops", "engine"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no GPU here")
    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limits = ops.machine(device)
    table = [
        {"what": "copy", "GB/s": limits["bytes/s"] / 1e9},
        {"what": "product", "10¹²/s": limits["products/s"] / 1e12},
    ]
    measured = {"ops": ops.rows(device), "engine": engine.rows(device, limits["products/s"])}
    for part, rows in measured.items():
        if given.only in (None, part):
            for row in rows:
                print(row, flush=True)
                table.append(row)
    save_table("gpu", table, " ".join((__doc__ or "").partition("    python")[0].split()))


if __name__ == "__main__":
    main()
