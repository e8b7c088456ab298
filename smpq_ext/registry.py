"""Finds what a room offers: every file of a package that names one class in `__all__` is an entry of its name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from smpq_ext.core import SmpqError


def names(room: str) -> tuple[str, ...]:
    """The entries of `smpq_ext.<room>`, sorted."""
    package = importlib.import_module(f"smpq_ext.{room}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def find(room: str, name: str) -> Any:
    """The class that `smpq_ext/<room>/<name>.py` offers. Raises SmpqError, listing the names there are."""
    if name not in names(room):
        raise SmpqError(f"{room.rstrip('s')}: {name!r} is not known; there are {', '.join(names(room))}")
    module = importlib.import_module(f"smpq_ext.{room}.{name}")
    (public,) = module.__all__
    return getattr(module, public)
