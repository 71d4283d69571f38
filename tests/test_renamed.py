"""Names of the public interface that were renamed."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest

from prism_plan.solvers import Options, solve
from tests.solvers.instances import random_instance

#: Module, old name, present name.
RENAMED = [
    ("prism_plan", "Plan", "SolveReport"),
    ("prism_plan", "SolverRefused", "UnsupportedFeature"),
    ("prism_plan", "Step", "MigrationStep"),
    ("prism_plan", "Workload", "TokenRates"),
    ("prism_plan", "expected_workload", "expected_token_rates"),
    ("prism_plan", "load_model", "load_model_spec"),
    ("prism_plan.solvers", "Answer", "SolverResult"),
    ("prism_plan.solvers", "Rule", "Feature"),
    ("prism_plan.solvers", "solvers_that_know", "solvers_supporting"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_old_names_give_the_present_object_and_a_warning(module: str, old: str, new: str) -> None:
    """Code that uses a name of the version before runs, and is told the present name."""
    package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is called {new} now") as told:
        assert getattr(package, old) is getattr(package, new)
    assert told[0].filename == __file__
    assert new in package.__all__
    assert old not in package.__all__


def test_near_is_reference() -> None:
    """Options whose field is given or read by its old name behave as before, with a warning."""
    placement = solve(random_instance(np.random.default_rng(0)))
    with pytest.warns(DeprecationWarning, match="Options.near is called reference now") as told:
        options = Options(near=placement, load_price=1.0)  # type: ignore[call-arg]
    assert told[0].filename == __file__
    assert options == Options(reference=placement, load_price=1.0)
    with pytest.warns(DeprecationWarning, match="Options.near is called reference now"):
        assert options.near is placement  # type: ignore[attr-defined]
    assert dataclasses.replace(options, seed=3).reference is placement
    assert Options().reference is None
