import inspect

import numpy as np
import pytest

from smpq_ext import registry
from smpq_ext.core import SmpqError

ROOMS = ("estimators", "solvers")


def test_what_is_there_is_found_by_its_file_name():
    assert {"exact", "permutation", "antithetic", "truncated", "leverage"} <= set(registry.names("estimators"))
    assert {"milp", "dp"} <= set(registry.names("solvers"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_entry_is_one_documented_class_that_needs_no_arguments(room):
    for name in registry.names(room):
        entry = registry.find(room, name)
        assert inspect.isclass(entry) and entry.__doc__
        assert "Raises" in entry.__doc__ and "Source" in entry.__doc__
        entry()


def test_entries_fit_their_protocols():
    for name in registry.names("estimators"):
        assert list(inspect.signature(registry.find("estimators", name)().steps).parameters) == [
            "game",
            "budget",
            "rng",
        ]
    for name in registry.names("solvers"):
        solver = registry.find("solvers", name)()
        assert list(inspect.signature(solver.__call__).parameters) == ["table", "budget", "pairwise"]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["nothing", "", "__init__", "os"])
def test_an_unknown_name_is_told_the_known_ones(room, name):
    with pytest.raises(SmpqError) as caught:
        registry.find(room, name)
    assert all(known in str(caught.value) for known in registry.names(room))


def test_a_new_file_is_a_new_entry(tmp_path, monkeypatch):
    import smpq_ext.estimators

    (tmp_path / "zero.py").write_text("__all__ = ['Zero']\n\nclass Zero: pass\n")
    (tmp_path / "_shared.py").write_text("")
    monkeypatch.setattr(smpq_ext.estimators, "__path__", [*smpq_ext.estimators.__path__, str(tmp_path)])
    assert "zero" in registry.names("estimators") and "_shared" not in registry.names("estimators")
    assert registry.find("estimators", "zero").__name__ == "Zero"
    assert np.all([name in registry.names("estimators") for name in ("exact", "leverage")])
