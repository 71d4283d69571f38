"""What a solver's plan of a small instance takes, beside the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prism_plan.errors import Infeasible
from prism_plan.placement import Placement
from prism_plan.solvers import Options, solve
from studies.small_instances.instances import SmallInstance, draw
from studies.small_instances.optimum import Measure, optimum
from studies.small_instances.record import read_record


@dataclass(frozen=True)
class Gap:
    """Seconds of a plan by the measure, those of the best plan known, and a bound for all plans."""

    number: int
    solver: str
    plan_s: float
    best_s: float
    bound_s: float

    @property
    def to_best(self) -> float:
        """How far above the best plan known, as a share of it; below 0 where this one is better."""
        return self.plan_s / self.best_s - 1

    @property
    def to_bound(self) -> float:
        """How far above the bound, as a share of it: at least as far as above the optimum."""
        return self.plan_s / self.bound_s - 1


def gap_of(solver_name: str, instance_number: int) -> Gap | None:
    """How far a solver is from the optimum of an instance; ``None`` where its plan does not fit.

    The optimum is that of ``studies/small_instances.json`` where the file has this instance, by its
    digest; else it is found anew, which takes up to a minute.
    """
    small = draw(instance_number)
    found = read_record()["instances"].get(str(instance_number), {})
    known: dict[str, Any] | None = found.get("optimum")
    if known is None or found["digest"] != small.digest():
        proven = optimum(small)
        best_s, bound_s = proven.value_s, proven.bound_s
    else:
        best_s, bound_s = known["value_s"], known["bound_s"]
    placement = plan(small, solver_name)
    if placement is None:
        return None
    seconds = Measure(small).value_s(placement.on_gpu, placement.execution_table)
    return Gap(instance_number, solver_name, seconds, best_s, bound_s)


def plan(small: SmallInstance, solver_name: str) -> Placement | None:
    """A solver's plan by the public call, ``None`` where it says that none fits."""
    try:
        return solve(small.problem(), solver_name, Options())
    except Infeasible:
        return None
