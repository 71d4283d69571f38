"""All solvers by name; the module of each is imported on first use."""

from __future__ import annotations

from importlib import import_module

from prism_plan.errors import InputError, did_you_mean
from prism_plan.solvers.contract import Feature, Solver

_MODULES = {
    "uniform": "uniform",
    "redundance": "redundance",
    "smartmoe": "smartmoe",
    "eplb": "eplb",
    "layer-partition": "layer_partition",
    "prism": "prism",
    "ilp": "ilp",
    "exact": "exact",
}

#: In the order of tables, from naive to exact.
SOLVER_NAMES = tuple(_MODULES)


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises
    ------
    InputError
        There is none.
    """
    if name not in _MODULES:
        raise InputError(
            f"unknown solver {name!r}{did_you_mean(name, SOLVER_NAMES)}",
            expected=f"one of {', '.join(SOLVER_NAMES)}",
        )
    solver: Solver = import_module(f"prism_plan.solvers.{_MODULES[name]}").SOLVER
    return solver


def solvers_supporting(features: frozenset[Feature]) -> list[str]:
    """Names of the solvers that support all of these features."""
    return [name for name in SOLVER_NAMES if features <= get_solver(name).supports]
