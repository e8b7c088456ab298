"""`pytest benchmarks --benchmark-only` runs every bench_*.py and prints its table; --save-tables keeps the tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.environment import markdown, save_table

TABLES = pytest.StashKey[dict[str, tuple[str, list[dict[str, Any]]]]]()  # name -> note, rows


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-tables", action="store_true", help="write the tables to benchmarks/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[TABLES] = {}


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The rows of the table that this file prints; bench_ops.py fills the table `ops`, its docstring is the note."""
    name = request.module.__name__.rpartition(".")[2].removeprefix("bench_")
    note = " ".join((request.module.__doc__ or "").split())
    return request.config.stash[TABLES].setdefault(name, (note, []))[1]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads for all sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, (note, rows) in config.stash[TABLES].items():
        if not rows:
            continue
        terminalreporter.section(name)
        terminalreporter.write_line(markdown(rows))
        if config.getoption("--save-tables"):
            save_table(name, rows, note)
