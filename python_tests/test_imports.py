"""The direction of imports (docs/design.md), read from the sources: every room sees only the rooms below it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smpq_ext"

# room -> the rooms of the package that it may import, besides itself
NUMBERS = {"typed", "core", "registry", "budget", "games", "store", "stopping", "surrogate"}
ALLOWED = {
    "typed": set(),
    "core": {"typed"},
    "registry": {"core"},
    "games": {"core"},
    "budget": {"core"},
    "store": {"core"},
    "stopping": {"core"},
    "surrogate": {"core"},
    "distributed": {"core"},
    "inputs": {"core"},
    "doctor": {"ops", "reference", "_C"},
    "estimators": {"core"},
    "solvers": {"core"},
    "report": {"core", "registry", "budget"},
    "ops": {"_C", "reference"},
    "reference": set(),
    "engine": {"typed", "core", "budget", "ops", "reference", "_C"},
}
FORBIDDEN = {
    "methods": {"cli", "report", "driver", "export", "tuning"},
    "tuning": {"cli", "report", "driver", "export"},
    "export": {"cli", "report"},
    "driver": {"cli", "report"},
}
NO_TORCH = NUMBERS | {"estimators", "solvers", "report"}


def sources(room):
    file, folder = PACKAGE / f"{room}.py", PACKAGE / room
    return [*([file] if file.exists() else []), *sorted(folder.rglob("*.py"))]


def imported(path):
    """The full names of all modules that a source names in imports, also those inside functions."""
    here = ["smpq_ext", *path.relative_to(PACKAGE).with_suffix("").parts][:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = ".".join([*here[: len(here) - node.level + 1], *([module] if module else [])])
            # `from smpq_ext import core` names the room behind the import
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "smpq_ext" else [module]


def rooms_of(path):
    return {name.split(".")[1] for name in imported(path) if name.startswith("smpq_ext.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_sees_only_the_rooms_below_it(room):
    for path in sources(room):
        assert rooms_of(path) - {room} <= ALLOWED[room], path


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_does_not_see_those_above_it(room):
    for path in sources(room):
        assert not rooms_of(path) & FORBIDDEN[room], path


def test_only_the_command_line_is_above_everything():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("cli.py", "__main__.py"):
            assert "cli" not in rooms_of(path), path


@pytest.mark.parametrize("room", sorted(NO_TORCH))
def test_rooms_of_numbers_do_not_name_torch(room):
    for path in sources(room):
        assert not any(name.split(".")[0] == "torch" for name in imported(path)), path


def test_rooms_of_numbers_do_not_load_torch():
    files = [path for room in sorted(NO_TORCH) for path in sources(room)]
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    modules = [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]
    assert "smpq_ext.core" in modules and "smpq_ext.solvers.milp" in modules
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
