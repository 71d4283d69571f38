"""All solvers by name; the module of each is imported on first use."""

from __future__ import annotations

from importlib import import_module

from prism_plan.errors import InputError, did_you_mean
from prism_plan.solvers.contract import Feature, Solver

#: In the order of tables, from naive to exact; the module of each has underscores for hyphens.
SOLVER_NAMES = (
    "uniform",
    "redundance",
    "smartmoe",
    "eplb",
    "layer-partition",
    "prism",
    "ilp",
    "exact",
)


#: After the name of a solver of experts: layers execute where that takes the least idle time.
PATHS = "+paths"


def get_solver(name: str) -> Solver:
    """The solver with this name, which may end with :data:`PATHS`.

    Raises
    ------
    InputError
        There is none.
    """
    experts = name.removesuffix(PATHS)
    if experts not in SOLVER_NAMES:
        raise InputError(
            f"unknown solver {name!r}{did_you_mean(experts, SOLVER_NAMES)}",
            expected=f"one of {', '.join(SOLVER_NAMES)}, or one of them with {PATHS}",
        )
    solver: Solver = import_module(f"prism_plan.solvers.{experts.replace('-', '_')}").SOLVER
    if name == experts:
        return solver
    from prism_plan.solvers.execution import with_paths

    return with_paths(solver)


def solvers_supporting(features: frozenset[Feature]) -> list[str]:
    """Names of the solvers that support all of these features."""
    return [name for name in SOLVER_NAMES if features <= get_solver(name).supports]
