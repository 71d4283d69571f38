"""Names of the public interface that were renamed."""

from __future__ import annotations

import importlib

import pytest

#: Module, old name, present name.
RENAMED = [
    ("prism_plan", "SolverRefused", "UnsupportedFeature"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_old_names_give_the_present_object_and_a_warning(module: str, old: str, new: str) -> None:
    """Code that uses a name of the version before runs, and is told the present name."""
    package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is called {new} now"):
        assert getattr(package, old) is getattr(package, new)
    assert new in package.__all__
    assert old not in package.__all__
