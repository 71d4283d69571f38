"""Solvers under one contract, by the names that the command line gives them."""

from typing import Any

from prism_plan.deprecated_names import renamed_names
from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult
from prism_plan.solvers.registry import (
    ALL_SOLVERS,
    PATHS,
    SOLVER_NAMES,
    TABLE_SOLVERS,
    get_solver,
    plans_tables,
    solvers_supporting,
)
from prism_plan.solvers.run import solve

__all__ = [
    "ALL_SOLVERS",
    "PATHS",
    "SOLVER_NAMES",
    "TABLE_SOLVERS",
    "Feature",
    "Options",
    "Solver",
    "SolverResult",
    "get_solver",
    "plans_tables",
    "solve",
    "solvers_supporting",
]

_current_name = renamed_names(
    __name__,
    {"Answer": "SolverResult", "Rule": "Feature", "solvers_that_know": "solvers_supporting"},
)


def __getattr__(name: str) -> Any:
    if (current := _current_name(name)) in __all__:
        return globals()[current]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
