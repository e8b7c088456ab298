"""Values by their types: what is a number, and dataclasses out of JSON that may be malformed."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

LARGEST = 1e100  # of the numbers in a file, of either sign: sums and figures of such do not overflow


def is_whole(value: object) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def load(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where it is no JSON, or a key is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def read(kind: Any, value: Any, name: str = "") -> Any:
    """The `kind`, a type as the fields of the dataclasses in core.py have, that a value out of JSON stands for.

    In arrays of float64 null stands for +inf. Raises ValueError that names the field where the value stands for none.
    """
    origin, parts = get_origin(kind), get_args(kind)
    words = "an object"
    if origin in (Union, UnionType):
        return None if value is None else read(parts[0], value, name)
    if is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        if isinstance(value, Mapping):
            return _built(kind, value, name)
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return {read(str, k, name): read(parts[1], v, f"{name}[{reprlib.repr(k)}]") for k, v in value.items()}
    elif origin is tuple:
        words = "a list" if parts[-1] is ... else f"a list of {len(parts)}"
        if isinstance(value, list | tuple) and (parts[-1] is ... or len(parts) == len(value)):
            kinds = parts[:1] * len(value) if parts[-1] is ... else parts
            return tuple(read(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif origin is np.ndarray:
        (number,) = get_args(parts[1])
        entries = np.array(value, object)  # of uneven rows, lists are the entries, and no numbers
        infinite = number is np.float64
        flat = [np.inf if v is None and infinite else read(float, v, name) for v in entries.ravel()]
        words = f"numbers of {number.__name__}"
        if infinite or all(abs(v) <= float(np.finfo(number).max) for v in flat):
            return np.array(flat, number).reshape(entries.shape)
    elif origin is Literal:
        words = " or ".join(parts)
        if value in parts:
            return value
    elif kind is str:
        words = "text"
        if isinstance(value, str) and value.encode(errors="ignore").decode() == value:  # no half of a surrogate pair
            return value
    elif kind is int:
        words = "a whole number of at most 64 bits"
        if is_whole(value) and abs(value) < 1 << 63:
            return value
    else:
        words = f"a number of at most {LARGEST:g}"
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
            return float(value)
    raise ValueError(f"{name + ': ' if name else ''}{words} is needed, not {reprlib.repr(value)}")


def _built(kind: Any, given: Mapping[str, Any], name: str) -> Any:
    """The dataclass `kind` of these fields."""
    hints, prefix = get_type_hints(kind), f"{name}." if name else ""
    for key in given:
        if key not in hints:
            raise ValueError(f"{prefix}{reprlib.repr(key)} is no field of this release")
    for f in fields(kind):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{prefix}{f.name} is missing")
    known = {key: read(hints[key], value, prefix + key) for key, value in given.items()}
    try:
        return kind(**known)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error
