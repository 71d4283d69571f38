"""Names of the public interface that were renamed."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest

from prism_plan.cluster import Cluster, Gpu, Server
from prism_plan.instance import Instance
from prism_plan.objective import step_score
from prism_plan.solvers import Options, solve
from prism_plan.token_rates import TokenRates, activations
from tests.profiling.synthetic import synthetic_trace
from tests.profiling.test_synthetic import TINY
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
    with pytest.warns(DeprecationWarning, match="Options: near is called reference now") as told:
        options = Options(near=placement, load_price=1.0)  # type: ignore[call-arg]
    assert told[0].filename == __file__
    assert options == Options(reference=placement, load_price=1.0)
    with pytest.warns(DeprecationWarning, match="Options: near is called reference now"):
        assert options.near is placement  # type: ignore[attr-defined]
    assert dataclasses.replace(options, seed=3).reference is placement
    assert Options().reference is None
    with pytest.raises(TypeError, match="also by its old name near"):
        Options(near=placement, reference=placement)  # type: ignore[call-arg]


def test_load_is_token_rates() -> None:
    """What users ask for may be given by the name that its parameters had before."""
    trace = synthetic_trace(TINY, ["x", "y"], requests=3, prompt_tokens=4, decode_tokens=2)
    rates = TokenRates(trace.tasks, np.ones((2, 2)))
    cluster = Cluster("c", tuple(Server(f"s{n}", (Gpu(slots=8),)) for n in range(2)))
    local = np.ones((2, TINY.num_layers, TINY.num_experts), bool)
    with pytest.warns(DeprecationWarning, match="Instance.build: load is called token_rates now"):
        instance = Instance.build(trace, cluster, load=rates)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="activations: load is called token_rates now"):
        calls = activations(trace, load=rates)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="step_score: load is called token_rates now"):
        steps = step_score(local, trace, load=rates)  # type: ignore[call-arg]
    assert np.array_equal(instance.activations, calls)
    assert np.array_equal(calls, activations(trace, rates))
    assert np.array_equal(steps.steps, step_score(local, trace, rates).steps)
