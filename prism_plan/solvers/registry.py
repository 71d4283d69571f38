"""All solvers by name; the module of each is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from prism_plan.errors import InputError, did_you_mean
from prism_plan.solvers.contract import Feature, Solver

#: Solvers that place experts, in the order of tables, from naive to exact; the module of each has
#: underscores for hyphens.
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
#: Solvers that plan experts and where layers execute together; the links of a cluster are needed.
TABLE_SOLVERS = ("pipeline", "latency")
ALL_SOLVERS = (*SOLVER_NAMES, *TABLE_SOLVERS)

#: After the name of a solver of experts: layers execute where that takes the least idle time.
PATHS = "+paths"


def get_solver(name: str) -> Solver:
    """The solver with this name; one of :data:`SOLVER_NAMES` may end with :data:`PATHS`.

    Raises
    ------
    InputError
        There is none, or it plans where layers execute by itself.
    """
    experts = name.removesuffix(PATHS)
    if experts not in ALL_SOLVERS:
        known = (*ALL_SOLVERS, *(solver + PATHS for solver in SOLVER_NAMES))
        raise InputError(
            f"unknown solver {name!r}{did_you_mean(name, known)}",
            expected=f"one of {', '.join(ALL_SOLVERS)}, or one that places experts with {PATHS}",
        )
    if experts in TABLE_SOLVERS and name != experts:
        raise InputError(
            f"solver {experts!r} plans by itself where layers execute",
            expected=f"{experts}, without {PATHS}",
        )
    solver: Solver = import_module(f"prism_plan.solvers.{experts.replace('-', '_')}").SOLVER
    if name == experts:
        return solver
    from prism_plan.solvers.execution import with_paths

    return with_paths(solver, name)


def plans_tables(name: str) -> bool:
    """Whether the solver of this name plans where layers execute."""
    return name in TABLE_SOLVERS or name.endswith(PATHS)


def solvers_supporting(
    features: frozenset[Feature], among: Sequence[str] = SOLVER_NAMES
) -> list[str]:
    """Names of the solvers that support all of these features, by default of those of experts."""
    return [name for name in among if features <= get_solver(name).supports]
