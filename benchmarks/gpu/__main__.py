"""What a GPU does, one JSON and one table: benchmarks/results/gpu.json and .md.

"copy" and "product": what a copy of 2 GiB and a product of two bfloat16 matrices of 8,192 x 8,192 reach here. Ops:
"µs" of a call inside a CUDA graph, on operands that fit no cache, and launched one by one; "of copy": the share of a
copy's bandwidth for the bytes that must be moved; "vs B2": torch's own ops, "vs B3": clamp(round) under torch.compile,
"vs B7": a Triton kernel, "vs empty": a kernel that does nothing. Coalitions: chains, random rows and mixtures as in
engine.md, random weights; "vs B4": a bank of weights at all widths, "vs B6": the bank under torch.compile in a CUDA
graph, "vs no replay": ours without CUDA graphs; "our kernels", "others", "idle": shares of the time; "of bf16 rate":
products a second after sharing, by those of the matrix product. Medians by events, sides in turn; torch's settings are
its defaults, so convolutions of loops may multiply in TF32. A case that fails says so in "error".

    python -m benchmarks.gpu [--only ops|engine]
"""

from __future__ import annotations

import argparse
import json
import traceback
from typing import Any

import torch

from benchmarks.environment import RESULTS, note_of, save_table
from benchmarks.gpu import engine, ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ops", "engine"), help="and keep the rows of the other part")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no GPU here")
    device = torch.device("cuda")
    limits = ops.machine(device)
    parts = {"ops": ops.cases(device), "engine": engine.cases(device, limits["products/s"])}
    file = RESULTS / "gpu.json"
    known = json.loads(file.read_text())["rows"] if given.only and file.exists() else []
    first = [
        {"part": "limits", "what": "copy", "GB/s": limits["bytes/s"] / 1e9},
        {"part": "limits", "what": "product", "10¹² products/s": limits["products/s"] / 1e12},
    ]
    table: dict[str, list[dict[str, Any]]] = {part: [r for r in known if r["part"] == part] for part in parts}
    for part, cases in parts.items():
        if given.only not in (None, part):
            continue
        table[part] = []
        for what, run in cases:
            row = {"part": part, "what": what}
            try:
                row |= run()
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(row, flush=True)
            table[part].append(row)
            # each time, for a machine may be taken away
            save_table("gpu", [*first, *table["ops"], *table["engine"]], note_of(__doc__))
    if any("error" in row for rows in table.values() for row in rows):
        raise SystemExit("benchmarks.gpu: some cases failed, see their errors above")


if __name__ == "__main__":
    main()
