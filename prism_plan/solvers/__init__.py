"""Solvers under one contract, by the names that the command line gives them."""

from prism_plan.solvers.contract import Feature, Options, Solver, SolverResult
from prism_plan.solvers.registry import SOLVER_NAMES, get_solver, solvers_supporting
from prism_plan.solvers.run import solve

__all__ = [
    "SOLVER_NAMES",
    "Feature",
    "Options",
    "Solver",
    "SolverResult",
    "get_solver",
    "solve",
    "solvers_supporting",
]
