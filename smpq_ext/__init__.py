"""smpq_ext: how many bits does each layer of a trained PyTorch model deserve?"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it. Loaded on first use, so that the torch-free rooms stay torch-free.
_PUBLIC = {
    "fake_quantize": "ops",
    "coalition_fake_quantize": "ops",
    "coalition_fake_quantize_list": "ops",
    "coalition_linear": "ops",
    "coalition_conv2d": "ops",
    "quantization_error": "ops",
    "evaluator": "engine.evaluator",
    "apply": "engine.apply",
    "search": "driver",
    "replace_fake_quant": "drop_in",
    "restore_fake_quant": "drop_in",
    "patched": "drop_in",
    "Plan": "core",
    "Result": "core",
    "SmpqError": "core",
    "Infeasible": "core",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
