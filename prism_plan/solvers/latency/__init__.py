"""Plans of least latency: experts and where layers execute, together."""

from prism_plan.solvers.latency.solver import SOLVER

__all__ = ["SOLVER"]
